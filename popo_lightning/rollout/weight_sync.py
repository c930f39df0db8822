"""The engine and the weights it samples with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from popo_lightning.core.kept_state import KeepsState
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, NamedTensors, RolloutEngine
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.rollout.engine_gap import EngineCheck
from popo_lightning.rollout.weight_alarms import Delivery, Probe


@dataclass(eq=False)
class WeightSync(KeepsState):
    """Starts the engine at its first use, and gives it the policy's weights.

    For delayed rollouts (``every`` above 1) these are the weights of an earlier iteration. A copy of them stays on the
    CPU, because an evaluation in between needs the newest ones, and a resumed run must continue with the same old ones.
    The engine loads the base model, so the first sync of a process always happens, resumed or not.

    Args:
        engine: The engine to sync.
        every: Iterations between syncs. The weights sampled with are at most every - 1 versions old.
        clock: Receives the seconds, as phase sync.
        context: Gives the engine's context when it starts; called once.
        policy: Gives the policy.
        idle: Waits until nothing is being generated, so weights never change during a generation.
    """

    state = ("_kept_version", "_kept")

    engine: RolloutEngine
    every: int
    clock: PhaseClock
    context: Callable[[], EngineContext]
    policy: Callable[[], PolicyModel]
    idle: Callable[[], None]

    def __post_init__(self) -> None:
        self.delivery = Delivery()
        self.probe: Probe | None = None  # set together with the check
        self.start_seconds = 0.0  # seconds of the engine's start and checks
        self.check: EngineCheck | None = None  # runs once, after the first sync of the policy's present weights
        self.as_loaded: Callable[[], bool] = lambda: False  # whether the policy has the weights of its folder
        self._started = False
        self._held: tuple[str, int] | None = None  # the engine's weights: ("step", global step) or ("version", version)
        self._kept: dict[str, Tensor] = {}
        self._kept_version: int | None = None
        self._kept_bits: str | None = None

    def forget(self) -> None:
        """Notes that the policy may have other weights now, at the same step."""
        self._held = None

    def newest(self, step: int, version: int) -> None:
        """Gives the engine the policy's present weights, unless it has them.

        Args:
            step: Optimizer steps taken.
            version: Policy version.
        """
        self._wake()
        policy = self.policy()
        self._give(("step", step), version, policy.named_weights, policy.trained_bits)

    def for_rollouts(self, step: int, version: int) -> None:
        """Does as :meth:`newest`, but between two syncs gives the weights of the last sync."""
        if self.every == 1:
            self.newest(step, version)
            return
        self._wake()
        policy, present = self.policy(), False
        if self._kept_version is None or version - self._kept_version >= self.every:
            self._kept = policy.kept_weights()
            self._kept_version, self._kept_bits, present = version, policy.trained_bits(), True
        version = self._kept_version
        self._give(
            ("version", version), version, lambda: policy.weights_kept(self._kept), lambda: self._kept_bits, present
        )

    def _wake(self) -> None:
        self.idle()
        if not self._started:
            with self._start_clock():
                self.engine.start(self.context())
                if self.check is not None and self.as_loaded() and self.engine.loads_model:
                    self.check.loaded()
            self._started = True
        self.engine.wake()

    def _check(self, given: bool) -> None:
        """Runs the gap check once per process, and the probe until its answers change. Their samples leave no trace."""
        probe = self.probe if given and self.probe is not None and not self.probe.done else None
        if self.check is None and probe is None:
            return
        with self._start_clock():
            check, self.check = self.check, None
            if check is not None:
                check.synced()
                self.engine.forget_prompts()
            if probe is not None:
                probe.after(self.delivery.identity)
                self.engine.forget_prompts()

    @contextmanager
    def _start_clock(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.clock.measure("start"):
            yield
        self.start_seconds += time.perf_counter() - began

    def _give(
        self,
        held: tuple[str, int],
        version: int,
        weights: Callable[[], NamedTensors],
        bits: Callable[[], str | None],
        present: bool = True,
    ) -> None:
        """Gives weights, unless the engine has them, and checks those of the present policy."""
        given = self._held != held or not self.engine.holds_weights
        if given:
            with self.clock.measure("sync"):
                self.engine.update_weights(self.delivery.watched(weights()), version)
                self.delivery.judge(bits())
            self._held = held
        self.engine.version = version
        if present:
            self._check(given)
