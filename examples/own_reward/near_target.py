"""A reward of your own: true steps that end near the target get a part of it.

It runs in grading processes, so the module must not import torch.
"""

from typing import Any

from popo_lightning.toys.countdown import verify_steps
from popo_lightning.verifiers.base import Verifier


class NearTarget(Verifier):
    """Gives 1 for a correct response. True steps with another result get `most`, halved with every `half` of distance.

    Args:
        most: Maximum reward of a wrong response, below 1.
        half: Distance from the target that halves the reward.
    """

    def __init__(self, most: float = 0.5, half: float = 4.0) -> None:
        self.most = most
        self.half = half

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns `score`, which is trained on, and `acc`, which is evaluated. All components are logged."""
        parts = verify_steps(answer, text)
        if parts["format"] and not parts["acc"]:
            result = int(text.strip().rsplit("=", 1)[1])
            parts["score"] = self.most * 0.5 ** (abs(result - answer["target"]) / self.half)
        return parts
