"""Verifiers that grading processes import, among them one that accepts all and one that misbehaves on cue."""

from __future__ import annotations

import os
import time
from typing import Any

from popo_lightning.toys.countdown import verify_steps
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.math import MathVerifier


class Length(Verifier):
    """Scores the length of a response; none is correct."""

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return {"score": float(len(text)), "acc": 0.0}


class AcceptsAll(Verifier):
    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return {"score": float(answer == text)}


class Picky(AcceptsAll):
    """Refuses answers by their content."""

    def __init__(self, word: str = "bad") -> None:
        self.word = word

    def check_answer(self, answer: Any) -> None:
        if answer == "hang":
            time.sleep(60)
        if answer == "die":
            os._exit(3)
        if self.word in str(answer):
            raise ValueError(f"it says {self.word}")


class WantsMapping(AcceptsAll):
    def check_answer(self, answer: Any) -> None:
        if not isinstance(answer, dict):
            raise ValueError("it is no mapping")


class NeverLoads(Picky):
    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ImportError("some library is not installed")


class Steps(AcceptsAll):
    """Grades as the embedded task does, as a verifier."""

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return verify_steps(answer, text)


MATHEMATICS = MathVerifier()


def accuracy(gold: str, answer: str) -> float:
    """Returns the accuracy of an answer in a box. The mathematics verifier must accept the gold answer."""
    MATHEMATICS.check_answer(gold)
    return MATHEMATICS(gold, f"\\boxed{{{answer}}}")["acc"]
