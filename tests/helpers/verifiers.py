"""Verifiers that grading processes import (one that accepts all, one that misbehaves on cue), and what one says."""

from __future__ import annotations

import os
import time
from typing import Any

from popo_lightning.toys.countdown import verify_steps
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.math import MathVerifier


class AcceptsAll(Verifier):
    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return {"score": float(answer == text)}


class Picky(AcceptsAll):
    """Refuses answers by what they say."""

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
    """The embedded task's grading, as a verifier."""

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        return verify_steps(answer, text)


MATHEMATICS = MathVerifier()


def accuracy(gold: str, answer: str) -> float:
    """Of an answer in a box, to a gold that the mathematics verifier takes."""
    MATHEMATICS.check_answer(gold)
    return MATHEMATICS(gold, f"\\boxed{{{answer}}}")["acc"]
