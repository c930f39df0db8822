"""Questions of a user's own, asked as a task asks its problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import IMAGE_MARK, Problem

ASKED = "asked"  # id of such a problem
SHOWN_CHARACTERS = 200


def asked_like(problem: Problem, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
    """A question in the frame of another problem: its messages with the last of the user's replaced, or plain text.

    Args:
        problem: One of the task.
        question: What is asked.
        images: Paths; their marks go before the question unless it has its own.
        gold: The right answer.

    Raises:
        SettingError: The answer is of another kind than the problem's.
    """
    answer = None if gold is None else gold_like(problem.answer, gold)
    text = marked(question, images)
    if isinstance(problem.prompt, str):
        return Problem(ASKED, text, answer, images=tuple(images))
    messages = [dict(message) for message in problem.prompt]
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    messages[last]["content"] = text
    return Problem(ASKED, messages, answer, images=tuple(images))


def marked(question: str, images: Sequence[str]) -> str:
    """A question with the marks of its images, before it unless it has marks.

    Raises:
        SettingError: It has marks, and not as many.
    """
    marks = question.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise SettingError(f"PROMPT has {marks} {IMAGE_MARK} marks, but --image gives {len(images)}; make them as many")
    return question if marks else IMAGE_MARK * len(images) + question


def gold_like(answer: Any, gold: str) -> Any:
    """A right answer as a task's verifier takes it: text, or JSON of the kind that its problems have.

    Args:
        answer: Of one of the task's problems.
        gold: As the user wrote it.

    Raises:
        SettingError: It is of another kind.
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
    """What a text is as JSON; None for one that is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def columns_of(question: str, names: Sequence[str], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row out of a question: the text of its prompt, or a JSON object where the template has other places.

    Args:
        question: What is asked.
        names: Places of the template.
        columns: Column that fills each.

    Raises:
        SettingError: An object is needed, and it is none, or lacks a place.
    """
    if list(names) == ["prompt"]:
        return {columns["prompt"]: question}
    row = json_of(question)
    missing = [name for name in names if not isinstance(row, dict) or name not in row]
    if missing:
        such = ", ".join(f'"{name}": ...' for name in names)
        raise SettingError(
            f"PROMPT has no {missing[0]}, which data.task.template of the run asks for; give a JSON object: {{{such}}}"
        )
    return {columns[name]: row[name] for name in names}
