"""Measures how far engine and trainer differ, before a run trains: as both were loaded, and after the first sync.

Both compute log-probs of the same tokens with the same weights, so they should differ by rounding alone. The difference
as loaded is the floor. A sync of unchanged weights must not change it, and later alarms are relative to it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import all_gather_object, lost_rank
from popo_lightning.engines.base import Sampling
from popo_lightning.rollout.generation import RolloutGenerator

# Nats a token on average. Rounding gives up to 1e-5 in float32, and in bfloat16 about 0.01, for some models 0.033.
EXACT_WARNING, ROUNDED_WARNING = 1e-3, 0.05
EXACT_ERROR, ROUNDED_ERROR = 0.01, 0.25
WARNING_FLOORS, ERROR_FLOORS = 3.0, 10.0  # times the floor, where that is more
PROMPTS, RESPONSES, TOKENS = 4, 4, 32  # of one measurement

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
        """Where a warning is given.

        Args:
            exact: Whether float32 is computed in.
            floor: Difference of engine and trainer as loaded; None where it is not known.
        """
        if self.warning is not None:
            return self.warning
        return max(EXACT_WARNING if exact else ROUNDED_WARNING, WARNING_FLOORS * (floor or 0.0))

    def above_error(self, exact: bool, floor: float | None) -> float:
        """Where a run stops, as :meth:`above_warning`; infinite where none does."""
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
        policy: The trainer's PolicyModule.
        engine: Name of the engine's class.

    Attributes:
        floor: The gap as both were loaded; None until it is known.
    """

    def __init__(self, measure: Callable[[], float], limits: GapLimits, policy: Any, engine: str) -> None:
        self.measure = measure
        self.limits = limits
        self.policy = policy
        self.engine = engine
        self.floor: float | None = None

    def loaded(self) -> None:
        """Finds the floor, with the weights that both have loaded.

        Raises:
            SettingError: It is above the limit: one of the two computes another model; or one of them cannot.
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
        self._judge(
            gap,
            self._warning(),
            self._error(),
            f"of which {self.engine} and the trainer compute log-probs {gap:.2g} nats a token apart from the same "
            "files",
        )
        self.floor = gap

    def synced(self) -> None:
        """Makes sure that the engine has the trainer's weights, once it has been given them.

        Raises:
            SettingError: The gap is above the limit, or far above the floor.
        """
        gap = self.measure()
        if self.floor is None:
            found = f"of which {self.engine} and the trainer are {gap:.2g} nats a token apart after a weight sync"
            self._judge(gap, self._warning(), self._error(), found)
            return
        # the weights have not changed, so that a gap worth a warning is worth an end
        error = self._warning() if self.limits.error == "auto" else self._error()
        self._judge(
            gap,
            self._warning(),
            error,
            f"of which log-probs by {self.engine} and the trainer are {self.floor:.2g} nats a token apart as loaded, "
            f"and {gap:.2g} after the first weight sync: weights do not arrive as they are",
        )

    def _warning(self) -> float:
        return self.limits.above_warning(self._exact, self.floor)

    def _error(self) -> float:
        return self.limits.above_error(self._exact, self.floor)

    @property
    def _exact(self) -> bool:
        return bool(self.policy.compute_dtype == torch.float32)

    @property
    def _named(self) -> str:
        name = type(getattr(self.policy.model, "module", self.policy.model)).__name__
        return f"model.path is '{self.policy.folder}', a {name}"

    def _judge(self, gap: float, warning: float, error: float, finding: str) -> None:
        """Says a finding if a gap is above a limit, or is no number."""
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
    maker: RolloutGenerator, policy: Any, problems: Sequence[Problem], sampling: Sampling, version: int = 0
) -> float:
    """Mean absolute difference in nats a token, over all ranks, of a few responses to the first problems. A collective.

    Args:
        maker: Samples.
        policy: The PolicyModule.
        problems: To ask.
        sampling: Of training; few tokens are sampled.
        version: Of the policy.
    """
    short = replace(sampling, max_new_tokens=min(TOKENS, sampling.max_new_tokens))
    groups = maker.ungraded(problems[:PROMPTS], RESPONSES, short, seed=0)
    gaps = gaps_of(Minibatch(groups, version, 0), policy)
    of_ranks = all_gather_object((sum(float(gap.sum()) for gap in gaps), sum(len(gap) for gap in gaps)))
    return sum(total for total, _ in of_ranks) / max(1, sum(count for _, count in of_ranks))


def gaps_of(minibatch: Minibatch, policy: Any) -> list[Tensor]:
    """(T,) absolute differences of each response's log-probs, as the engine recorded and the policy computes them."""
    recorded = [response.behave_logp for response in minibatch.responses]
    scored = policy.logprobs(minibatch)
    return [(a.double() - b.double()).abs() for a, b in zip(recorded, scored, strict=True)]
