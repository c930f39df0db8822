"""Problems with images, for an untrained model."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task


def picture(width: int, height: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        corners = [(draw.randrange(width), draw.randrange(height)) for _ in range(2)]
        canvas.line(corners, fill=draw.choice(["black", "red", "blue"]), width=3)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def asked(id: str, text: str, *images: bytes | str) -> Problem:
    return Problem(id, [{"role": "user", "content": text}], None, images=images)


def verify_even(answer: Any, text: str) -> dict[str, float]:
    """Rewards responses by whether their length is odd, so that a random model has effective groups."""
    return {"score": float(len(text) % 2), "acc": float(len(text) % 2)}


class Pictures(Task):
    """Args: text: Interval of problems without an image; 0 for none."""

    def __init__(self, text: int = 0) -> None:
        self.text = text

    verify = staticmethod(verify_even)

    def train_problems(self) -> list[Problem]:
        sizes = [(84, 56), (28, 56), (56, 56)]
        return [
            asked(f"p{i}", str(i))
            if self.text and i % self.text == 0
            else asked(f"p{i}", f"<image>{i}", picture(*sizes[i % 3], i))
            for i in range(9)
        ]

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        return {}
