"""Says what a setting accepts: turns "Expected int or null. Got value: many" into a sentence with a remedy."""

from __future__ import annotations

import math
import re

from popo_lightning.cli.trainer_settings import SEEDS
from popo_lightning.core.errors import SettingError
from popo_lightning.core.number_settings import LARGEST, MAX
from popo_lightning.model.sharding import check_precision

EXPECTED = re.compile(r"Expected (?:an? )?(.+?)\.? Got value:\s*(.*)$")
NO_SUBCLASS = re.compile(r"(?:Import path|Expected) ?(\S*) (?:does not correspond to|to be) a subclass of (.+)$")
ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S+) is (?:abstract|a protocol)")
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "null": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of names to values",
}
SOURCES = ("data.task.train", "data.task.benchmarks")  # a message may be about a part of these
OTHERS = {
    r"FunctionAddress:? does not match": "{0} names no function; write it as my_rewards.py:shout, or in a list",
    r"Missing required keys: \{(.*?)\}\. Got value: (.*)$": "{0} has {2}, which lacks {1}; add it",
    r"Unexpected keys: \{(.*?)\}\. Got value": "{0} has {1}, which it does not take; correct or remove it",
    r"Expected a tuple with (\d+) elements$": "{0} has another number of parts; use a list of {1}",
    r"import path or a subclass spec, but got None": "{0} is null, but a class belongs there; leave it out",
    r"a class path \(str\)$": "{0} has what is no class there; give its class_path and init_args",
    r"(?:Unexpected import path format:|Invalid content in sub-config file) (\S+)": (
        "{0} is '{1}', which is no import path; write one as package.module.Class"
    ),
}
SHOWN = 100  # longest value in a message, in characters


def misfit(setting: str, text: str) -> str | None:
    """Returns a sentence about a value of the wrong kind, or None if the message is about something else.

    Args:
        setting: Name of the setting.
        text: jsonargparse's message on one line.
    """
    found = EXPECTED.search(text)
    kinds = found and _kinds(found.group(1))
    if not setting or not found or not kinds:
        return None
    value, words = found.group(2), _listed([WORDS.get(kind, kind) for kind in kinds])
    if (inner := re.match(r"NestedArg\(key='([\w.]+)'", value)) is not None:
        return f"{setting}.{inner.group(1)} is no setting, since {setting} has none inside it; give {setting} {words}"
    if setting == "trainer.precision":
        try:
            check_precision(value)
        except SettingError as error:
            return str(error)
    if setting == "seed_everything":
        words = f"a whole number from 0 to {SEEDS - 1}"
    if setting in SOURCES and not value.startswith(("{", "[")):
        return f"{setting} has {_shown(value)} where {words} belongs"
    return f"{setting} is {_shown(value)}; use {words}{_hint(setting, kinds, value)}"


def misnamed(setting: str, text: str) -> str | None:
    """Returns a sentence about a missing or unknown name in a mapping or a value that is no class, else None.

    Args:
        setting: Name of the setting.
        text: jsonargparse's message on one line.
    """
    for pattern, sentence in OTHERS.items():
        found = re.search(pattern, text)
        if found is not None:
            return sentence.format(setting, *(part.replace("'", "") for part in found.groups()))
    return None


def no_subclass(setting: str, text: str) -> str | None:
    """Returns a sentence about a class that does not fit a slot, or None if the message is about something else.

    Args:
        setting: Name of the setting.
        text: jsonargparse's message on one line.
    """
    found = ABSTRACT.search(text)
    if found is not None:
        return f"{setting} is {found.group(1)}, which only describes such classes; name one that is derived from it"
    found = NO_SUBCLASS.search(text)
    if found is None:
        return None
    given, kind = found.group(1).strip("'"), re.sub(r"\.* (Got value:.*)?$|\.+$", "", found.group(2))
    kind = re.sub(r"<class '([^']*)'>|Union\[(.*)\]", lambda part: part[1] or part[2].replace(", ", " or "), kind)
    what = f"{setting} is {given}, which is no {kind}" if given else f"{setting} names a class that is no {kind}"
    return f"{what}; name a class derived from it"


def _kinds(text: str) -> list[str]:
    """Kinds of value in a message, each a key of WORDS or a description; empty if one is unknown."""
    kinds: list[str] = []
    for part in re.split(r" or (?![^\[]*\])", text):
        if part == "torch.Tensor":  # users write a number
            continue
        described = _kind(part)
        if not described:
            return []
        kinds += [one for one in described if one not in kinds]
    return kinds


def _kind(part: str) -> list[str]:
    if part in WORDS:
        return [part]
    if found := re.fullmatch(r"Literal\[(.*)\]", part):
        return [choice.strip("' ") for choice in found.group(1).split(", ")]
    if found := re.fullmatch(r"tuple with (\d+) elements", part):
        return [f"a list of {found.group(1)}"]
    if found := re.fullmatch(r"(list|tuple|dict)\[(.*)\]", part):
        inner = [one.rpartition(".")[2] for one in found.group(2).split(", ") if one != "..."]
        if found.group(1) == "dict":
            return [f"a mapping of names to {inner[-1]}" if inner[-1] not in WORDS else WORDS["dict"]]
        if inner == ["str"]:
            return ["a list of texts, such as [one, two]"]
        many = f"a list of {len(inner)}" if len(inner) > 1 else "a list"
        return [f"{many} of whole numbers" if set(inner) == {"int"} else many]
    return []


def _shown(value: str) -> str:
    if value in ("None", "True", "False"):
        return {"None": "null", "True": "true", "False": "false"}[value]
    value = value if len(value) <= SHOWN else f"{value[: SHOWN - 1]}…"
    return value if re.fullmatch(r"[\[{(].*|[-+.\w]+", value) else f"'{value}'"


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _hint(setting: str, kinds: list[str], value: str) -> str:
    """Says how to write a value whose meaning is clear."""
    if not {"int", "float"} & set(kinds):
        return ""
    if re.fullmatch(r"[-+]?\d+,\d+", value):
        return f", with a point for the comma: {value.replace(',', '.')}"
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
        return f", a share as part of 1: {float(found.group(1)) / 100:g}"
    try:
        number = float(value)
    except ValueError:
        return ""
    if "int" not in kinds or not math.isfinite(number) or not number.is_integer():
        return ""
    most, _ = MAX.get(setting, (LARGEST, ""))
    if abs(number) > most:
        return f" of at most {most}"
    return f", in digits alone: {int(number)}"
