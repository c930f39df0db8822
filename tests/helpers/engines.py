"""Engines that may work beside the trainer: they have their own model and do not touch the process's random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popo_lightning.core.groups import Response
from popo_lightning.engines.base import NamedTensors, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine


class Apart(TransformersEngine):
    """Fails if weights change while it samples."""

    generates_while_training = True
    checked = False
    stream = RolloutEngine.stream  # yields everything at once, so tests only override generate

    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        assert not self.busy, "weights change under a generation"
        super().update_weights(weights, version)

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        assert not self.busy, "two generations at a time"
        self.busy = True
        try:
            return super().generate(prompts, n, sampling, seed)
        finally:
            self.busy = False


class Recording(TransformersEngine):
    """Keeps what it has sampled, by the seed of the call."""

    stream = RolloutEngine.stream  # calls generate

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, tuple[list[list[int]], list[list[Response]]]] = {}

    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        responses = super().generate(prompts, n, sampling, seed)
        self.calls[seed] = [prompt.ids.tolist() for prompt in prompts], responses
        return responses
