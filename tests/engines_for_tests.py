"""An engine that may work beside the trainer: a model of its own and a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from popo_lightning.groups import Response
from popo_lightning.rollout.engine import NamedTensors, Sampling
from popo_lightning.rollout.transformers import TransformersEngine


class Apart(TransformersEngine):
    """Samples without the process's random state, and notices weights that change while it does."""

    generates_while_training = True

    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        assert not self.busy, "weights change under a generation"
        super().update_weights(weights, version)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        assert not self.busy, "two generations at a time"
        self.busy = True
        try:
            self._generator = torch.Generator().manual_seed(seed)
            flat = self._generate_batch([prompt for prompt in prompts for _ in range(n)], sampling)
            return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]
        finally:
            self.busy = False

    def _draw(self, logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        if sampling.temperature == 0:
            return super()._draw(logits, sampling)
        logp = (logits / sampling.temperature).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=self._generator).squeeze(-1)
        return token, logp.gather(-1, token[:, None]).squeeze(-1)
