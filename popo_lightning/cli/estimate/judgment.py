"""Judges a checkpoint on a benchmark: gives estimates with intervals, or refuses to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popo_lightning.cli.estimate import estimators
from popo_lightning.cli.estimate.bootstrap import Estimated, mean_over_problems
from popo_lightning.cli.estimate.names import LARGEST_WEIGHT, POSITION
from popo_lightning.cli.estimate.star import ABSTRACTIONS, star
from popo_lightning.cli.estimate.trajectories import Trajectories
from popo_lightning.metrics.effective import Floats, effective_responses, too_few, usable

SAMPLED = "as sampled"
IMPORTANCE = "importance sampling"


@dataclass(frozen=True)
class Choices:
    """Settings of the estimators.

    Args:
        max_weight: Largest weight in the clipped estimate.
        abstraction: Abstraction of STAR, by its name in ABSTRACTIONS.
        last: Number of tokens in STAR's weights; 0 takes all.
        seed: Seed of the bootstrap.
    """

    max_weight: float = LARGEST_WEIGHT
    abstraction: str = POSITION
    last: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Judgment:
    """Judgment of one benchmark.

    Args:
        problems: Number of problems.
        responses: Number of responses.
        effective: (P,) effective responses of each problem.
        usable: Number of problems whose responses say something about the target.
        mean_weight: Mean weight of the responses; about 1 if they cover what the target does.
        sampled: Accuracy of the responses as they are.
        estimates: Estimates of the target's accuracy, by estimator; empty if too few problems are usable.
        changes: Estimates minus what was sampled, problem by problem, so that differences between problems cancel out.
    """

    problems: int
    responses: int
    effective: Floats
    usable: int
    mean_weight: float
    sampled: Estimated
    estimates: Mapping[str, Estimated]
    changes: Mapping[str, Estimated]

    @property
    def refused(self) -> bool:
        """Whether more than half of the problems are not usable."""
        return too_few(self.usable, self.problems)

    @property
    def share_unusable(self) -> float:
        """Fraction of the problems that are not usable."""
        return 1 - self.usable / self.problems


def named_estimators(choices: Choices) -> dict[str, Callable[[Trajectories], float]]:
    """Estimators by the names that are printed.

    Args:
        choices: Settings of the estimators.
    """
    states = ABSTRACTIONS[choices.abstraction]
    of_last = f", last {choices.last} tokens, biased" if choices.last else ""
    return {
        IMPORTANCE: estimators.importance_sampling,
        "per-decision": estimators.per_decision,
        "doubly robust": estimators.doubly_robust,
        f"STAR ({choices.abstraction}{of_last})": lambda t: star(t, states(t), choices.last),
        f"clipped at {choices.max_weight:g} (biased)": lambda t: estimators.clipped(t, choices.max_weight),
        "geometric (biased)": estimators.geometric,
    }


def judged(logged: Sequence[Trajectories], choices: Choices = Choices()) -> Judgment:  # frozen
    """Judges a policy by the responses to P problems.

    Args:
        logged: Responses to each problem.
        choices: Settings of the estimators.

    Raises:
        ValueError: There is no problem.
    """
    if not logged:
        raise ValueError("a policy is judged by at least one problem")
    effective = np.array([effective_responses(each.log_weights) for each in logged])
    of_use = sum(usable(each.log_weights) for each in logged)
    sampled = np.array([estimators.sampled_mean(each) for each in logged])
    weights = np.exp(np.clip(np.concatenate([each.log_weights for each in logged]), -50, 50))
    estimates, changes = {}, {}
    if not too_few(of_use, len(logged)):
        for name, estimator in named_estimators(choices).items():
            values = np.array([estimator(each) for each in logged])
            estimates[name] = mean_over_problems(values, choices.seed)
            changes[name] = mean_over_problems(values - sampled, choices.seed)
    return Judgment(
        problems=len(logged),
        responses=len(weights),
        effective=effective,
        usable=of_use,
        mean_weight=float(weights.mean()),
        sampled=mean_over_problems(sampled, choices.seed),
        estimates=estimates,
        changes=changes,
    )
