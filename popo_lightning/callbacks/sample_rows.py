"""Rows of samples.jsonl: a response with its prompt, rewards, advantage and age."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem

SHOWN_CHARACTERS = 2000
IMAGES = "samples_images"  # folder inside the run's, for images that problems hold as bytes


def group_rows(group: Group, advantages: Sequence[Tensor | None], version: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each response of a group. Long texts are cut.

    Args:
        group: Graded group.
        advantages: One per response, with one number or one per token; rows show the mean. None if nothing is trained.
        version: Policy version of the iteration.
    """
    problem = group.problem
    images = {"images": [_name(image) for image in problem.images]} if problem.images else {}
    for response, advantage in zip(group.responses, advantages, strict=True):
        yield (
            {
                "iteration": version + 1,
                "group": group.id,
                "problem": problem.id,
                "prompt": _cut(problem.prompt),
                "answer": problem.answer,
                "response": response.text[:SHOWN_CHARACTERS],
                "score": response.parts["score"],
                "parts": response.parts,
                "failure": response.failure,
                "advantage": None if advantage is None else round(float(advantage.float().mean()), 3),
                "age": version - group.version_of(response),
                "fresh": group.version == version,
                "finish_reason": response.finish_reason,
                "tokens": len(response.token_ids),
            }
            | ({} if response.temperature is None else {"temperature": round(response.temperature, 3)})
            | images
        )


def save_images(folder: Path, problem: Problem) -> None:
    """Writes the images that a problem holds as bytes, under the names that its rows give them."""
    for image in problem.images:
        if isinstance(image, bytes):
            path = folder / _name(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)


def _name(image: str | bytes) -> str:
    """Path of an image. For bytes it is relative to the run's folder."""
    return image if isinstance(image, str) else f"{IMAGES}/{hashlib.sha256(image).hexdigest()[:24]}"


def _cut(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Cuts a prompt, or each of its messages, to SHOWN_CHARACTERS."""
    if isinstance(prompt, str):
        return prompt[:SHOWN_CHARACTERS]
    return [
        {**message, "content": content[:SHOWN_CHARACTERS]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in prompt
    ]
