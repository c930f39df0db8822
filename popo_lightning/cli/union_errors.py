"""Shortens jsonargparse's error about a value that fits none of several types to the type that was meant."""

from __future__ import annotations

import re

UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: (.*?) Given value type: .*?"
    r" Given value:\s*(.*)$"
)
KNOWN = re.compile(r"class_path '|dot import path|Option '|Multiple subclasses|No module named|has no attribute")
DULL = ("Expected a <class", "Expected a typing", "Not a valid subclass", "Expected a path", "Not of type Function")


def of_union(found: re.Match[str]) -> str:
    """Returns the most informative part of the error.

    Args:
        found: Match of :data:`UNION`.
    """
    kinds, errors, value = found.groups()
    alone = "FunctionAddress" in kinds and "Errors: " not in errors
    if alone and re.match(r"\S+\.py\b|\{'function'", value):
        return "a FunctionAddress does not match"
    if "FunctionAddress" in kinds and "Errors: " in errors:
        return _of_functions(errors.rpartition("Errors: ")[2], value)
    dull = (*DULL, "Expected a dot import") if "torch.Tensor" in kinds else DULL  # users write a number
    if kinds.startswith("dict[") and value.startswith("NestedArg"):
        return "Expected a mapping, as '{NAME: {SETTING: VALUE}}', or a file's"
    telling = [error for error in re.split(r"(?:^| )- ", errors) if error and not error.startswith(dull)]
    if telling:
        owner = re.search(r"class_path='[\w.]*?(\w+)'", value)
        if owner is not None and telling[0].startswith("the following arguments"):
            return f"Problem with given class_path '{owner.group(1)}': {telling[0]}"
        return telling[0] if owner is None or KNOWN.search(telling[0]) else f"{owner.group(1)} refuses {telling[0]}"
    names = re.sub(r"<class '([^']*)'>", r"\1", kinds).replace("NoneType", "null").replace("typing.", "")
    names = " or ".join(name for name in re.split(r", (?![^\[]*\])", names))
    return f"Expected {names}. Got value: {value}"


def _of_functions(errors: str, value: str) -> str:
    """Returns what is wrong with one function of a list."""
    value = value.partition(" Given value")[0]
    text, *others = [error for error in re.split(r"(?:^| )- ", errors) if error]
    if "does not match" in text or not others:
        return f"{text}. Got value: {value}"
    return others[0] if "Got value" in others[0] else f"{others[0]}. Got value: {value}"
