"""Turns a user's own question into a problem that is asked like a task's problems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import IMAGE_MARK, Problem

ASKED = "asked"  # id of the user's problem
SHOWN_CHARACTERS = 200


def asked_like(problem: Problem, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
    """Puts a question into another problem's format: its messages with the last user message replaced, or plain text.

    Args:
        problem: Problem of the task.
        question: Text of the question.
        images: Paths of images; their marks are put before the question unless it has marks.
        gold: Right answer.

    Raises:
        SettingError: The marks do not fit the images, or the answer is of another kind than the problem's.
    """
    answer = None if gold is None else gold_like(problem.answer, gold)
    prompt = with_question(problem.prompt, marked(question, images))
    return Problem(ASKED, prompt, answer, images=tuple(images))


def with_question(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """A prompt with another text: the text alone, or messages with the user's last one replaced, or a message added."""
    if isinstance(prompt, str):
        return text
    users = [place for place, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        return [*prompt, {"role": "user", "content": text}]
    last = users[-1]
    return [*prompt[:last], prompt[last] | {"content": text}, *prompt[last + 1 :]]


def marked(question: str, images: Sequence[str]) -> str:
    """Puts the marks of images before a question, unless it has marks.

    Raises:
        SettingError: The question has marks, but not one per image.
    """
    marks = question.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise SettingError(f"PROMPT has {marks} {IMAGE_MARK} marks, but --image gives {len(images)}; make them as many")
    return question if marks else IMAGE_MARK * len(images) + question


def gold_like(answer: Any, gold: str) -> Any:
    """Converts a right answer as the user wrote it to the kind that an answer of the task's problems has: text or JSON.

    Raises:
        SettingError: The right answer is of another kind.
    """
    if isinstance(answer, str):
        return gold
    found = json_of(gold)
    numbers = isinstance(answer, int | float) and isinstance(found, int | float)
    alike = found.keys() == answer.keys() if isinstance(answer, dict) and isinstance(found, dict) else numbers
    if not alike and not (isinstance(answer, list) and isinstance(found, list)):
        such = json.dumps(answer)[:SHOWN_CHARACTERS]
        raise SettingError(f"--gold is '{gold}', but an answer of the run's task is JSON such as {such}; give that")
    return found


def json_of(text: str) -> Any:
    """Parses a text as JSON; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
