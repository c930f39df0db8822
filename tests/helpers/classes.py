"""User classes whose constructors fail in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.proximal.snapshot import ProximalSnapshot
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.tasks.samplers import EpochSampler
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.verifiers.base import Verifier


class BrokenVerifier(Verifier):
    def __init__(self, file: str = "/nowhere/words") -> None:
        self.words = Path(file).read_text()

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return {"score": 0.0}


class TwoLines(BrokenVerifier):
    def __init__(self) -> None:
        raise ValueError("of two\nlines")


class Leaves(BrokenVerifier):
    def __init__(self) -> None:
        raise SystemExit(7)


class BrokenTask(CountdownSteps):
    def __init__(self) -> None:
        self.share = 1 / 0


class BrokenComposer(OnPolicy):
    def __init__(self) -> None:
        self.groups = self.nothing  # type: ignore[attr-defined]


class BrokenEngine(TransformersEngine):
    def __init__(self) -> None:
        raise AssertionError


class BrokenSampler(EpochSampler):
    def __init__(self) -> None:
        raise NotImplementedError


class BrokenWeight(TruncatedIS):
    def __init__(self) -> None:
        super().__init__(cap=2.0, nothing=3)  # type: ignore[call-arg]


class BrokenProximal(ProximalSnapshot):
    def __init__(self) -> None:
        self.number = int("x")


class BrokenCallback(L.Callback):
    def __init__(self) -> None:
        raise ImportError("libwords is not there")


class BrokenOptimizer(torch.optim.AdamW):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        raise OSError("no kernel")
