"""Converts a row to a problem: columns, template, gold answer and images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import IMAGE_MARK, Problem
from popo_lightning.core.user_question import ASKED, gold_like, json_of, marked
from popo_lightning.tasks.row_images import BadValue, row_image
from popo_lightning.tasks.sources import Row, Source
from popo_lightning.tasks.template import Template
from popo_lightning.verifiers.base import Verifier
from popo_lightning.verifiers.boxed import last_boxed

MAX_CHARACTERS = 1_000_000
OWN_NAMES = ("prompt", "id", "level", "subject")
ROLES = ("system", "user", "assistant")
MISSING = object()


@dataclass(eq=False)
class RowReader:
    """Makes problems from a source's rows.

    Args:
        source: Source, which maps columns to fields.
        template: Template of the question.
        system: System message; None for none.
        response_prefix: Beginning of every response. "" gives none, even if a row has one.
        chat: Ask in chat messages, otherwise in plain text.
    """

    source: Source
    template: Template
    system: str | None
    response_prefix: str | None
    chat: bool

    def __post_init__(self) -> None:
        self.columns: dict[str, Any] = dict(self.source.get("columns", {}))

    def needed(self) -> dict[str, str]:
        """Returns the columns that some row must have, with the setting that asks for each."""
        found: dict[str, str] = {}
        for name, column in {"answer": "answer", **self.columns}.items():
            for one in column.values() if isinstance(column, dict) else [column]:
                found[one] = f"columns.{name}"
        for name in self.template.names:
            found.setdefault(self._column(name), "columns.prompt" if name == "prompt" else "template")
        return found

    def problem(self, row: Row, made_up_id: str, id_prefix: str = "") -> Problem:
        """Makes the problem of a readable row.

        Args:
            row: The row.
            made_up_id: Id of the problem, unless a column gives one.
            id_prefix: Prefix of either id.

        Raises:
            BadValue: The row gives no problem.
        """
        assert row.content is not None
        content = row.content
        own_id = reach(content, self.columns.get("id", "id"))
        id = id_prefix + (made_up_id if own_id is MISSING or own_id is None else _text(own_id, "id"))
        images = self._images(content, row.folder)
        prompt = self._prompt(content)
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        marks = sum(text.count(IMAGE_MARK) for text in texts)
        if marks != len(images):
            raise BadValue(f"has {marks} {IMAGE_MARK} marks in its prompt but {len(images)} images; make them as many")
        return Problem(id, prompt, self._answer(content), self._info(content), images)

    def asked(self, question: str, images: Sequence[str], gold: str | None) -> Problem:
        """Makes a problem from a user's question.

        Args:
            question: Question, or a JSON object if the template has places other than {prompt}.
            images: Paths of images.
            gold: Correct answer, in JSON if the source's answer is a mapping.

        Raises:
            SettingError: The template cannot be filled, or the answer has the wrong form.
        """
        values = self._values_in(question, images)
        row = {self._column(name): value for name, value in values.items()}
        named = self.columns.get("answer")
        like = dict.fromkeys(named, "...") if isinstance(named, dict) else "..."
        answer = None if gold is None else gold_like(like, gold)
        try:
            prompt = self._prompt(row)
        except BadValue as error:
            raise SettingError(f"PROMPT {error}") from error
        return Problem(ASKED, prompt, answer, images=tuple(images))

    def _values_in(self, question: str, images: Sequence[str]) -> dict[str, Any]:
        """Returns the value of each place of the template: the question, or the values of a JSON object."""
        names = self.template.names
        if names == ["prompt"]:
            return {"prompt": marked(question, images)}
        values = json_of(question)
        missing = [name for name in names if not isinstance(values, dict) or name not in values]
        if missing:
            such = ", ".join(f'"{name}": ...' for name in names)
            raise SettingError(
                f"PROMPT has no {missing[0]}, which data.task.template of the run asks for; give a JSON object: "
                f"{{{such}}}"
            )
        return {name: values[name] for name in names}

    def graded_by(self, problem: Problem, row: Row, verifier: Verifier) -> Problem:
        """Adds the columns that the verifier asks for to the answer. Raises BadValue if the row lacks one."""
        content = row.content or {}
        named = {name: reach(content, column) for name, column in self.columns.items() if isinstance(column, str)}
        values = content | {name: value for name, value in named.items() if value is not MISSING}
        for name in verifier.columns():
            _present(values, name)
        gold = verifier.gold(problem.answer, {**values, "prompt": problem.question})
        return problem if gold is problem.answer else replace(problem, answer=_plain(gold, "row for the verifier"))

    # -- the prompt --------------------------------------------------------------------------------------------

    def _column(self, place: str) -> str:
        """Returns the column that fills a place: a part of the answer, a mapped field, or a column of the same name."""
        answer = self.columns.get("answer")
        if isinstance(answer, dict) and place in answer:
            return answer[place]
        column: str = self.columns.get(place, place) if place in OWN_NAMES else place
        return column

    def _prompt(self, content: dict[str, Any]) -> str | list[dict[str, Any]]:
        asked = reach(content, self._column("prompt")) if "prompt" in self.template.names else None
        if isinstance(asked, list):
            return self._messages(content, asked)
        text = self._fill(content)
        if not self.chat:
            return text
        return self._framed([{"role": "user", "content": text}])

    def _messages(self, content: dict[str, Any], asked: list[Any]) -> list[dict[str, Any]]:
        """Returns a row's own chat messages. The template fills the last question."""
        for message in asked:
            known = isinstance(message, dict) and message.get("role") in ROLES
            if not known or not isinstance(message.get("content"), str):
                raise BadValue("has a prompt that is a list of something else than messages of text; correct it")
        if not self.chat:
            raise BadValue("has chat messages as its prompt; set data.task.chat to true")
        messages = [{"role": message["role"], "content": message["content"]} for message in asked]
        questions = [message for message in messages if message["role"] == "user"]
        if not questions:
            raise BadValue("has chat messages without one of the user; correct it")
        questions[-1]["content"] = self._fill(content, questions[-1]["content"])
        if self.system is not None and messages[0]["role"] == "system":
            del messages[0]
        if self.response_prefix is not None and messages[-1]["role"] == "assistant":
            del messages[-1]
        return self._framed(messages)

    def _framed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if self.response_prefix:
            messages.append({"role": "assistant", "content": self.response_prefix})
        return messages

    def _fill(self, content: dict[str, Any], prompt: str | None = None) -> str:
        def value(place: str) -> str:
            if place == "prompt" and prompt is not None:
                return _text(prompt, "prompt")
            column = self._column(place)
            return _text(_present(content, column), column)

        return self.template.fill(value)

    # -- the rest ----------------------------------------------------------------------------------------------

    def _answer(self, content: dict[str, Any]) -> Any:
        column = self.columns.get("answer", "answer")
        if isinstance(column, dict):
            return {name: _plain(_present(content, one), one) for name, one in column.items()}
        answer = _present(content, column)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # such as 27.0 from a table that has only floats
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(_plain(answer, column))
        mark = self.source.get("answer_after")
        if mark is not None or self.source.get("answer_boxed"):
            answer = _text(answer, column)
        if mark is not None:
            _, found, answer = answer.rpartition(mark)
            if not found:
                raise BadValue(f"has no '{mark}' in '{column}'; correct it, or the source's answer_after")
            answer = answer.replace(",", "")
        if self.source.get("answer_boxed"):
            answer = last_boxed(answer)
            if answer is None:
                raise BadValue(f"has no \\boxed in '{column}'; correct it, or the source's answer_boxed")
        return _text(answer, column).strip() if isinstance(answer, str) else _plain(answer, column)

    def _info(self, content: dict[str, Any]) -> dict[str, Any]:
        values = {name: reach(content, self.columns.get(name, name)) for name in ("level", "subject")}
        return {
            name: _plain(value, name) for name, value in values.items() if value is not MISSING and value is not None
        }

    def _images(self, content: dict[str, Any], folder: Path) -> tuple[str | bytes, ...]:
        found = reach(content, self.columns.get("images", "images"))
        if found is MISSING or found is None:
            return ()
        return tuple(row_image(image, folder) for image in (found if isinstance(found, list) else [found]))


def reach(content: object, column: str) -> Any:
    """Returns a column's value, or MISSING. A dotted name may lead into nested columns."""
    if isinstance(content, dict) and column in content:
        return content[column]
    value = content
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) < 9 and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def _present(content: dict[str, Any], column: str) -> Any:
    value = reach(content, column)
    if value is MISSING or value is None:
        raise BadValue(f"has no '{column}'; fill it in or remove the row")
    return value


def _text(value: object, column: str) -> str:
    """Converts a row's text, number or list to text that a tokenizer takes."""
    if not isinstance(value, str | int | float | list) or isinstance(value, bool):
        raise BadValue(f"has a {type(value).__name__} as '{column}'; give text")
    text = value if isinstance(value, str) else str(_plain(value, column))
    if not text.strip():
        raise BadValue(f"has an empty '{column}'; fill it in or remove the row")
    if len(text) > MAX_CHARACTERS:
        raise BadValue(f"has a '{column}' of over {MAX_CHARACTERS} characters; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadValue(f"has a '{column}' with half a character (a lone surrogate); correct it") from None
    return text


def _plain(value: Any, column: str) -> Any:
    """Returns a value if it consists of plain JSON types and is of bounded size."""
    try:
        written = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise BadValue(f"has a '{column}' that is no plain JSON value; correct it") from None
    if len(written) > MAX_CHARACTERS:
        raise BadValue(f"has a '{column}' of over {MAX_CHARACTERS} bytes; remove it")
    return value


def absent_columns(needed: dict[str, str], rows: Sequence[Row]) -> list[str]:
    """Returns the needed columns that no row has."""
    contents = [row.content for row in rows if row.content is not None]
    return [column for column in needed if all(reach(content, column) is MISSING for content in contents)]
