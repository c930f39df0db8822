"""Which weights the engine samples with, and when it is given others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popo_lightning.rollout.engine import NamedTensors, RolloutEngine
from popo_lightning.timing import PhaseClock


class WeightSync:
    """Keeps the engine at the policy's weights, or, for delayed rollouts, at those of an earlier iteration.

    With ``every`` above 1 a copy of the weights that rollouts sample with is kept on the CPU: an evaluation in between
    needs the newest ones, and a resumed run has to go on with the same old ones.

    Args:
        engine: What is synced.
        every: Iterations between syncs; the weights sampled with are at most every - 1 versions old.
        clock: Seconds go there, as sync.
    """

    def __init__(self, engine: RolloutEngine, every: int, clock: PhaseClock) -> None:
        self.engine = engine
        self.every = every
        self.clock = clock
        self._held: tuple[str, int] | None = None  # what the engine has: ("step", global step) or ("version", version)
        self._kept: dict[str, Tensor] = {}
        self._kept_version: int | None = None

    def forget(self) -> None:
        """The policy may have other weights now, at the same step."""
        self._held = None

    def newest(self, step: int, version: int, weights: Callable[[], NamedTensors]) -> None:
        """Gives the engine the policy's present weights, unless it has them.

        Args:
            step: Optimizer steps taken.
            version: Policy version.
            weights: The policy's, by name.
        """
        self._give(("step", step), version, weights)
        self.engine.version = version

    def for_rollouts(self, step: int, version: int, weights: Callable[[], NamedTensors]) -> None:
        """As :meth:`newest`, or, between two syncs, the weights of the last one."""
        if self.every == 1:
            self.newest(step, version, weights)
            return
        if self._kept_version is None or version - self._kept_version >= self.every:
            self._kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights()}
            self._kept_version = version
        kept = self._kept_version
        self._give(("version", kept), kept, self._kept.items)
        self.engine.version = kept

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
