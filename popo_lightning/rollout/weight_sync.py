"""The engine and the weights it samples with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, NamedTensors, RolloutEngine
from popo_lightning.rollout.engine_gap import EngineCheck


class WeightSync:
    """Starts the engine at its first use, and gives it the policy's weights.

    For delayed rollouts (``every`` above 1) these are the weights of an earlier iteration. A copy of them stays on the
    CPU: an evaluation in between needs the newest ones, and a resumed run must continue with the same old ones. The
    engine loads the base model, so the first sync of a process always happens, resumed or not.

    Args:
        engine: The engine to sync.
        every: Iterations between syncs; the weights sampled with are at most every - 1 versions old.
        clock: Receives the seconds, as phase sync.
        context: Gives the engine's context when it starts; called once.
        weights: Gives the policy's present weights, by name.
        idle: Waits until nothing is being generated, so weights never change during a generation.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        every: int,
        clock: PhaseClock,
        context: Callable[[], EngineContext],
        weights: Callable[[], NamedTensors],
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.every = every
        self.clock = clock
        self.context = context
        self.weights = weights
        self.idle = idle
        self.start_seconds = 0.0  # of the engine, and of its check, once a process
        self.check: EngineCheck | None = None  # made once, after the first sync of the policy's present weights
        self.as_loaded: Callable[[], bool] = lambda: False  # whether the policy has the weights of its folder
        self._started = False
        self._held: tuple[str, int] | None = None  # what the engine has: ("step", global step) or ("version", version)
        self._kept: dict[str, Tensor] = {}
        self._kept_version: int | None = None

    def forget(self) -> None:
        """The policy may have other weights now, at the same step."""
        self._held = None

    def newest(self, step: int, version: int) -> None:
        """Gives the engine the policy's present weights, unless it has them.

        Args:
            step: Optimizer steps taken.
            version: Policy version.
        """
        self._wake()
        self._give(("step", step), version, self.weights)
        self.engine.version = version
        self._check()

    def for_rollouts(self, step: int, version: int) -> None:
        """As :meth:`newest`, or, between two syncs, the weights of the last one."""
        if self.every == 1:
            self.newest(step, version)
            return
        self._wake()
        present = False
        if self._kept_version is None or version - self._kept_version >= self.every:
            self._kept = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights()}
            self._kept_version, present = version, True
        self._give(("version", self._kept_version), self._kept_version, self._kept.items)
        self.engine.version = self._kept_version
        if present:
            self._check()

    def _wake(self) -> None:
        self.idle()
        if not self._started:
            with self._start_clock():
                self.engine.start(self.context())
                if self.check is not None and self.as_loaded() and self.engine.loads_model:
                    self.check.loaded()
            self._started = True
        self.engine.wake()

    def _check(self) -> None:
        """Once a process; what it samples leaves nothing behind."""
        if self.check is None:
            return
        with self._start_clock():
            check, self.check = self.check, None
            check.synced()
            self.engine.forget_prompts()

    @contextmanager
    def _start_clock(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.clock.measure("start"):
            yield
        self.start_seconds += time.perf_counter() - began

    def _give(self, held: tuple[str, int], version: int, weights: Callable[[], NamedTensors]) -> None:
        if self._held == held and self.engine.holds_weights:
            return
        with self.clock.measure("sync"):
            self.engine.update_weights(weights(), version)
        self._held = held

    def state_dict(self) -> dict[str, Any]:
        """The delayed weights, if there are any."""
        return {"kept_version": self._kept_version, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._kept_version = state["kept_version"]
        self._kept = {name: torch.as_tensor(weight) for name, weight in state["kept"].items()}
