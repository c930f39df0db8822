"""Parses what a response does from one comparison: `len>512`, `format>=1`, `response contains "so"`.

The parser does without eval: it reads a field, a comparison, and a number or a quoted text.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from popo_lightning.core.errors import SettingError

Holds = Callable[[Mapping[str, Any]], bool]

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
NUMBER = r"[+-]?\d{1,15}(?:\.\d{1,15})?"
COMPARED = re.compile(rf"\s*([A-Za-z_]\w{{0,63}})\s*(>=|<=|==|!=|>|<)\s*({NUMBER})\s*", re.ASCII)
CONTAINED = re.compile(r'\s*([A-Za-z_]\w{0,63})\s+contains\s+("(?:[^"\\]|\\.){1,999}")\s*', re.ASCII)
OTHER_NAMES = {"len": "tokens", "length": "tokens", "text": "response"}
MAX_CHARACTERS = 1200


def parsed(expression: str) -> Holds:
    """Parses the expression into a function of a row.

    Args:
        expression: FIELD COMPARISON NUMBER, or FIELD contains "TEXT". len is the number of tokens, text the response;
            other fields are the row's own or its reward components.

    Raises:
        SettingError: The expression is invalid. The function raises it too, for a row without the field.
    """
    if len(expression) <= MAX_CHARACTERS:
        if found := COMPARED.fullmatch(expression):
            field, compare, number = found[1], COMPARISONS[found[2]], float(found[3])
            return lambda row: compare(_number(row, field), number)
        if (found := CONTAINED.fullmatch(expression)) and (text := _text_in(found[2])) is not None:
            field = found[1]
            return lambda row: text in _text(row, field)
    raise SettingError(
        f"--action is '{expression[:80]}'; write one comparison, such as 'len>512', 'format>=1' or 'response contains "
        '"so"\''
    )


def _text_in(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:  # an escape that JSON does not have
        return None


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """Value of a row's own field or of a reward component; 0 if grading failed, which gives score and acc alone.

    Args:
        row: Line of a file of responses.
        name: Name of the field or component.

    Raises:
        KeyError: The row has neither.
    """
    if name in row:
        return row[name]
    parts = row.get("parts")
    if isinstance(parts, Mapping) and name in parts:
        return parts[name]
    if row.get("failure") is not None:
        return 0.0
    raise KeyError(name)


def _value(row: Mapping[str, Any], field: str) -> Any:
    try:
        return field_of(row, OTHER_NAMES.get(field, field))
    except KeyError as error:
        raise SettingError(
            f"--action names '{field}', which a row does not have; it has {', '.join(sorted(map(str, row)))}"
        ) from error


def _number(row: Mapping[str, Any], field: str) -> float:
    found = _value(row, field)
    if isinstance(found, int | float):
        return float(found)
    raise SettingError(f"--action compares '{field}' with a number, but a row has text there; use contains")


def _text(row: Mapping[str, Any], field: str) -> str:
    found = _value(row, field)
    if isinstance(found, str):
        return found
    raise SettingError(f"--action looks for text in '{field}', but a row has none there; compare it with a number")
