"""Says what belongs where a class is known and only its settings are given: `popo compare`'s methods, LoRA, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from popo_lightning.core.errors import SettingError, shortened

# How each is written. jsonargparse would ask for a class there.
FORMS = {
    "methods": "NAME: {config: [method/grpo]}",
    "model.lora": "{r: 16}",
    "model.critic": "{lr: 1.0e-5}",
    "data.limits": "NAME: {bound: 300}",
    "data.overlong": "{buffer_tokens: 100}",
}
NO_CLASS = re.compile(r"Expected a dot import path string|Not a valid subclass of \w+|dot import path")
GIVEN = re.compile(
    r"Given value: NestedArg\(key='.*?', val=(.*)\)\s*$|Given value: (.*)\s*$|Got value: (.*)$|path string: (.*)$", re.M
)
LONGEST = 100  # characters of a value in a sentence


def settings_alone(setting: str, message: str) -> str | None:
    """Returns a sentence about a value that has no settings, or None if the message is about something else.

    Args:
        setting: Name of the setting.
        message: jsonargparse's message, over several lines.
    """
    form = FORMS.get(setting)
    if form is None or NO_CLASS.search(message) is None:
        return None
    found = list(GIVEN.finditer(message))
    value = "" if not found else next(part for part in found[-1].groups() if part is not None).strip().strip("'")
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value) or "class_path" in value:  # a class, though a misspelt one
        return None
    value = {"None": "null", "True": "true", "False": "false"}.get(value, f"'{shortened(value, LONGEST)}'")
    return f"{setting} has {value} where settings belong; write them as {form}"


def check_methods(given: Any) -> None:
    """Raises SettingError for a method of a comparison that has no settings.

    Args:
        given: The methods as a file of popo compare has them.
    """
    for name, method in given.items() if isinstance(given, Mapping) else ():
        if not isinstance(method, Mapping):
            _refuse(f"methods.{name}", method, "give its settings, such as {{config: {}}}")
        elif "config" in method and not isinstance(method["config"], list):
            _refuse(f"methods.{name}.config", method["config"], "give a list of files, such as {}")


def _refuse(setting: str, value: Any, remedy: str) -> None:
    files = value if isinstance(value, list) else [value]
    named = all(isinstance(file, str) and file.strip() for file in files) and files
    shown = "null" if value is None else f"[{', '.join(map(str, value))}]" if isinstance(value, list) else repr(value)
    example = f"[{', '.join(files) if named else 'method/grpo'}]"
    raise SettingError(f"{setting} is {shortened(shown, LONGEST)}; {remedy.format(shortened(example, LONGEST))}")
