"""Problems with images, for an untrained model."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from helpers.groups import group
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.model.prompts import PromptEncoder


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


def minibatch_groups(folder: Path, problems: Sequence[Problem]) -> list[Group]:
    """Returns a group of three random answers for each problem."""
    encoder, found = PromptEncoder(folder, 100), []
    draw = torch.Generator().manual_seed(0)
    for id, problem in enumerate(problems):
        prompt = encoder.encode(problem)
        answers = [
            Response(torch.randint(2, 12, (4,), generator=draw), -torch.ones(4), "stop", "", {"score": s, "acc": s})
            for s in (0.0, 1.0, 1.0)
        ]
        found.append(Group(id, group(id).problem, prompt.ids, answers, 0, prompt.images))
    return found


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
