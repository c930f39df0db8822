"""Logs once that a metric has left its healthy range, and what to do."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from popo_lightning.callbacks.broken_policy import BrokenPolicyDetector
from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.model.policy_model import policy_of
from popo_lightning.rollout.engine_rollouts import rollouts_of

WINDOW = 10  # iterations in a mean: the effective share of a few groups is often 0 by chance
RECOVERED = 10  # consecutive iterations in range, after which a kind may be warned of again
MAX_SAID = 3  # warnings of one kind per run
LOWER_RATE = "lower the learning rate (model.optimizer)"
LESS_REPLAY = (
    f"{LOWER_RATE} or data.composer's buffer.max_age, set its buffer.max_uses, or replay what still holds alone "
    "(configs/method/popo_gated.yaml, popo_rested.yaml)"
)
SHARES = ("min_replayed_ess", "min_entropy", "max_replayed", "min_effective_share", "max_truncated")
# Metrics whose values are compared with a setting: by the setting, the metric and what it means to be out of range.
RANGES = {
    "min_replayed_ess": ("weight/replayed_ess", f"what is replayed teaches noise; {LESS_REPLAY}"),
    "max_weight": ("weight/replayed_max", f"the policy has moved far from what it replays; {LESS_REPLAY}"),
    "max_truncated": (
        "rollout/truncated_frac",
        "most responses are cut at data.max_new_tokens; raise it, or set data.stop where a base model does not end by "
        "itself",
    ),
}

log = logging.getLogger(__name__)


@dataclass
class Watched:
    """State of one kind of warning.

    Args:
        outside: Consecutive iterations out of range.
        inside: Consecutive iterations in range.
        told: Whether the present excursion has been warned of.
        said: Number of warnings so far.
    """

    outside: int = 0
    inside: int = 0
    told: bool = False
    said: int = 0

    def sees(self, is_outside: bool, patience: int) -> bool:
        """Notes an iteration, and returns whether to warn now."""
        self.outside = self.outside + 1 if is_outside else 0
        self.inside = 0 if is_outside else self.inside + 1
        if self.inside >= RECOVERED:
            self.told = False
        if self.outside < patience or self.told or self.said >= MAX_SAID:
            return False
        self.told, self.said = True, self.said + 1
        return True


@dataclass
class Course:
    """Values of a metric at the start of the run and now.

    Args:
        first: Values of the first iterations that have the metric.
        recent: Values of the last iterations that have it.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Adds the value of the next iteration."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent = [*self.recent, value][-WINDOW:]

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return sum(self.first) / max(1, len(self.first))

    @property
    def now(self) -> float:
        """Mean of the recent values."""
        return sum(self.recent) / max(1, len(self.recent))

    @property
    def whole(self) -> bool:
        """Whether there are enough recent values for a mean."""
        return len(self.recent) == WINDOW


@dataclass(eq=False)
class Health(L.Callback):
    """Watches each iteration's metrics and warns once per kind, with the value, the limit and the remedy.

    It warns when a metric has been out of range for ``patience`` consecutive iterations. After ten iterations in range
    it may warn again, at most three times per run. A limit of null is switched off.

    Args:
        min_replayed_ess: Minimum of weight/replayed_ess, the effective sample size of the replayed tokens as a fraction
            of their number. Below 0.5 most replayed tokens only add noise.
        max_weight: Maximum of weight/replayed_max, the largest importance weight of a replayed token. It stays below 10
            while a policy learns; a collapse raised it to 25,000.
        min_entropy: Minimum of policy/entropy as a fraction of its mean over the first ten iterations. Entropy falls
            slowly as a policy learns; a policy that has lost 90% of it samples the same responses again and again.
        max_replayed: Maximum of replay/share as a mean over ten iterations. Above 0.8 each group is trained on five
            times or more; docs/evidence.md shows runs that this degrades.
        min_effective_share: Minimum of rollout/effective_share as a mean over ten iterations. Below 0.05 fewer than one
            group in 20 carries a gradient.
        max_truncated: Maximum of rollout/truncated_frac. Above 0.5 most responses are graded without their end.
        patience: Consecutive iterations before a warning. It also applies to iterations without any optimizer step.
    """

    min_replayed_ess: float | None = 0.5
    max_weight: float | None = 100.0
    min_entropy: float | None = 0.1
    max_replayed: float | None = 0.8
    min_effective_share: float | None = 0.05
    max_truncated: float | None = 0.5
    patience: int = 3

    def __post_init__(self) -> None:
        for name in SHARES:
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise SettingError(f"health.{name} is {share}; use a share between 0 and 1, or null")
        if self.max_weight is not None and self.max_weight <= 1:
            raise SettingError(f"health.max_weight is {self.max_weight}; use a number above 1, such as 100, or null")
        at_least("health.patience", self.patience, 1, " iteration, such as 3")
        self._watched: dict[str, Watched] = {}
        self._courses: dict[str, Course] = {}
        self._steps = 0.0
        self.broken_policy = BrokenPolicyDetector(self.patience)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warns on rank 0, which alone has the metrics of every rank."""
        if trainer.is_global_zero:
            iteration, metrics = rollouts_of(trainer).iteration, policy_of(pl_module).iteration_metrics
            fallen = self.broken_policy.see(metrics.get("rollout/all_wrong_share"), iteration)
            for sentence in [*self.statements(metrics), *([self._fallen()] if fallen else [])]:
                log.warning("iteration %d: %s", iteration, sentence)

    def statements(self, metrics: dict[str, float]) -> list[str]:
        """Warnings about an iteration's metrics; call it once per iteration."""
        kinds = (self._entropy, self._replayed, self._effective, self._still)
        said = [self._out_of_range(setting, metrics) for setting in RANGES] + [kind(metrics) for kind in kinds]
        return [sentence for sentence in said if sentence]

    def _course(self, name: str, metrics: dict[str, float]) -> Course:
        """Course of a metric, with its present value added if there is one."""
        course = self._courses.setdefault(name, Course())
        if name in metrics:
            course.add(metrics[name])
        return course

    # -- one kind each -------------------------------------------------------------------------------------------

    def _out_of_range(self, setting: str, metrics: dict[str, float]) -> str:
        metric, meaning = RANGES[setting]
        limit, value = getattr(self, setting), metrics.get(metric)
        if limit is None or value is None:
            return ""
        outside, side = (value < limit, "below") if setting.startswith("min") else (value > limit, "above")
        return self._judged(setting, outside, f"{metric} is {value:.3g}, {side} {limit:g}: {meaning}")

    def _entropy(self, metrics: dict[str, float]) -> str:
        limit, value = self.min_entropy, metrics.get("policy/entropy")
        start = self._course("policy/entropy", metrics).start
        if limit is None or value is None:
            return ""
        return self._judged(
            "min_entropy",
            value < limit * start,
            f"policy/entropy is {value:.2g} nats, below {limit:g} of the {start:.2g} at the start: the policy "
            f"collapses to a few responses; {LOWER_RATE}, add EntropyBonus to model.regularizers, or replay less "
            "(data.composer's buffer.max_uses)",
        )

    def _replayed(self, metrics: dict[str, float]) -> str:
        limit, course = self.max_replayed, self._course("replay/share", metrics)
        if limit is None or not course.whole:
            return ""
        return self._judged(
            "max_replayed",
            course.now > limit,
            f"replay/share is {course.now:.2g} over {WINDOW} iterations, above {limit:g}: the policy trains on the "
            "same few groups over and over; set data.composer's buffer.max_uses to 2, raise "
            f"data.problems_per_iteration, take problems of which more groups are effective, or {LOWER_RATE}",
        )

    def _effective(self, metrics: dict[str, float]) -> str:
        limit, course = self.min_effective_share, self._course("rollout/effective_share", metrics)
        if limit is None or not course.whole or "rollout/effective_share" not in metrics:
            return ""
        return self._judged(
            "min_effective_share",
            course.now < limit,
            f"rollout/effective_share is {course.now:.2g} over {WINDOW} iterations, below {limit:g}: hardly any group "
            f"has different rewards; {_why(course, metrics)}",
        )

    def _still(self, metrics: dict[str, float]) -> str:
        taken = metrics.get("train/optimizer_steps")
        if taken is None:
            return ""
        stood_still, self._steps = taken == self._steps, taken
        return self._judged(
            "patience",
            stood_still,
            f"no optimizer step in {self.patience} iterations: no group was effective and none was there to replay; "
            "look at samples.jsonl, take problems nearer to what the policy can do, or raise data.group_size",
        )

    def _fallen(self) -> str:
        since, before = self.broken_policy.since, self.broken_policy.before
        return (
            f"no response has been right since iteration {since}, while {before:.0%} of the groups "
            f"were all wrong before: the policy is broken, and so is what is saved from now on; stop, {LOWER_RATE} or "
            "set model.max_grad_norm, and resume from an earlier checkpoint by --ckpt_path (health.patience)"
        )

    def _judged(self, kind: str, is_outside: bool, sentence: str) -> str:
        """The sentence and its setting if it is time to warn, else ""."""
        if not self._watched.setdefault(kind, Watched()).sees(is_outside, self.patience):
            return ""
        return f"{sentence} (health.{kind}; docs/metrics.md has the healthy ranges)"

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, so that a resumed run does not repeat warnings."""
        return {
            "watched": {kind: asdict(watched) for kind, watched in self._watched.items()},
            "courses": {name: asdict(course) for name, course in self._courses.items()},
            "steps": self._steps,
            "broken_policy": self.broken_policy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._watched = {kind: Watched(**watched) for kind, watched in state_dict["watched"].items()}
        self._courses = {name: Course(**course) for name, course in state_dict["courses"].items()}
        self._steps = state_dict["steps"]
        if "broken_policy" in state_dict:  # an earlier version saved none
            self.broken_policy.load_state_dict(state_dict["broken_policy"])


def _why(course: Course, metrics: dict[str, float]) -> str:
    """Says why hardly any group is effective, and what to do."""
    if metrics.get("rollout/all_wrong_share", 0.0) <= 0.5:
        return "the problems are too easy: take harder ones, or raise data.group_size"
    if course.start >= 2 * course.now and course.start > 0:
        return (
            f"it was {course.start:.2g} at the start, and most are all wrong now: the policy is breaking; {LOWER_RATE}"
            ", or replay less (data.composer's buffer.max_uses)"
        )
    return (
        "the problems are too hard for the policy, or its format is missed: look at samples.jsonl, take easier ones, "
        "or raise data.group_size"
    )
