"""Measures how far engine and trainer differ before a run trains: as both were loaded, and after the first sync.

Both compute log-probs of the same tokens with the same weights, so they should differ only by rounding. The difference
as loaded is the floor. A sync of unchanged weights must not change it, and later alarms are relative to it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_gather_object, lost_rank
from popo_lightning.engines.base import Sampling
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.rollout.generation import RolloutGenerator

# Mean nats per token. Rounding gives up to 1e-5 in float32, and in bfloat16 about 0.01, for some models 0.033.
EXACT_WARNING, ROUNDED_WARNING = 1e-3, 0.05
EXACT_ERROR, ROUNDED_ERROR = 0.01, 0.25
WARNING_FLOORS, ERROR_FLOORS = 3.0, 10.0  # multiples of the floor, used if they exceed the limits above
PROMPTS, RESPONSES, TOKENS = 4, 4, 32  # size of one measurement

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GapLimits:
    """Limits of the mean absolute difference in nats per token.

    Args:
        warning: Limit above which a warning is logged; None follows the floor.
        error: Limit above which a run stops; "auto" follows the floor, None never stops it.
    """

    warning: float | None = None
    error: float | Literal["auto"] | None = "auto"

    def above_warning(self, exact: bool, floor: float | None) -> float:
        """Returns the gap above which a warning is given.

        Args:
            exact: Whether the computation is in float32.
            floor: Difference of engine and trainer as loaded; None if unknown.
        """
        if self.warning is not None:
            return self.warning
        return max(EXACT_WARNING if exact else ROUNDED_WARNING, WARNING_FLOORS * (floor or 0.0))

    def above_error(self, exact: bool, floor: float | None) -> float:
        """Returns the gap above which a run stops, infinite if none does. Takes :meth:`above_warning`'s arguments."""
        if self.error is None:
            return math.inf
        if self.error != "auto":
            return self.error
        return max(EXACT_ERROR if exact else ROUNDED_ERROR, ERROR_FLOORS * (floor or 0.0))


class EngineCheck:
    """Measures the gap before training, and stops a run whose engine and trainer compute different policies.

    Args:
        measure: Measures the present gap; a collective.
        limits: Limits of the gap.
        policy: The trainer's policy.
        engine: Name of the engine's class.

    Attributes:
        floor: The gap as both were loaded; None until it is known.
    """

    def __init__(self, measure: Callable[[], float], limits: GapLimits, policy: PolicyModel, engine: str) -> None:
        self.measure = measure
        self.limits = limits
        self.policy = policy
        self.engine = engine
        self.floor: float | None = None

    def loaded(self) -> None:
        """Measures the floor, with the weights that both have loaded.

        Raises:
            SettingError: The floor is above the limit, so one of the two computes another model; or one of them fails.
        """
        try:
            gap = self.measure()
        except SettingError:
            raise
        except Exception as error:  # a model's code may raise anything, such as for a kernel that this device lacks
            if isinstance(error, RuntimeError) and lost_rank(error):
                raise
            why = f"{type(error).__name__}: {reason(error)}"
            raise SettingError(
                f"{self._named}, on which {self.engine} or the trainer fails ({why}); choose another model or "
                "data.engine"
            ) from error
        found = (
            f"of which {self.engine} and the trainer compute log-probs {gap:.2g} nats a token apart from the same files"
        )
        self._judge(gap, *self._bounds(), found)
        self.floor = gap

    def synced(self) -> None:
        """Checks, after a sync, that the engine has the trainer's weights.

        Raises:
            SettingError: The gap is above the limit, or far above the floor.
        """
        gap = self.measure()
        warning, error = self._bounds()
        if self.floor is None:
            found = f"of which {self.engine} and the trainer are {gap:.2g} nats a token apart after a weight sync"
        else:
            found = (
                f"of which log-probs by {self.engine} and the trainer are {self.floor:.2g} nats a token apart as "
                f"loaded, and {gap:.2g} after the first weight sync: weights do not arrive as they are"
            )
            if self.limits.error == "auto":  # the weights have not changed, so a gap worth a warning is an error
                error = warning
        self._judge(gap, warning, error, found)

    def _bounds(self) -> tuple[float, float]:
        exact = self.policy.compute_dtype == torch.float32
        return self.limits.above_warning(exact, self.floor), self.limits.above_error(exact, self.floor)

    @property
    def _named(self) -> str:
        name = type(getattr(self.policy.model, "module", self.policy.model)).__name__
        return f"model.path is '{self.policy.folder}', a {name}"

    def _judge(self, gap: float, warning: float, error: float, finding: str) -> None:
        """Warns or raises with a finding if a gap is above a limit, or is NaN."""
        if gap <= warning and gap <= error:
            return
        sentence = (
            f"{self._named}, {finding}; choose another model or data.engine, or set monitor.gap_error to null to train "
            "all the same"
        )
        if not gap <= error and self.limits.error is not None:
            raise SettingError(sentence)
        log.warning("%s", sentence)


def measured_gap(
    generator: RolloutGenerator, policy: PolicyModel, problems: Sequence[Problem], sampling: Sampling, version: int = 0
) -> float:
    """Measures the mean absolute difference in nats per token, over all ranks, on a few responses. A collective.

    Args:
        generator: Samples the responses.
        policy: Policy that scores them.
        problems: Problems, of which the first are asked.
        sampling: Sampling of training, of which only the number of tokens is reduced.
        version: Version of the policy.
    """
    gaps = gaps_of(Minibatch(few_answers(generator, problems, sampling), version, 0), policy)
    of_ranks = all_gather_object((sum(float(gap.sum()) for gap in gaps), sum(len(gap) for gap in gaps)))
    return sum(total for total, _ in of_ranks) / max(1, sum(count for _, count in of_ranks))


def few_answers(generator: RolloutGenerator, problems: Sequence[Problem], sampling: Sampling) -> list[Group]:
    """Samples a few short responses to the first problems, always with the same seed, without a trace in the run."""
    short = replace(sampling, max_new_tokens=min(TOKENS, sampling.max_new_tokens))
    return generator.ungraded(problems[:PROMPTS], RESPONSES, short, seed=0)


def gaps_of(minibatch: Minibatch, policy: PolicyModel) -> list[Tensor]:
    """Returns (T,) absolute differences between the engine's and the policy's log-probs of each response."""
    recorded = [response.behave_logp for response in minibatch.responses]
    scored = policy.logprobs(minibatch)
    return [(a.double() - b.double()).abs() for a, b in zip(recorded, scored, strict=True)]
