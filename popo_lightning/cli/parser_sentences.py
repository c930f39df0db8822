"""Turns jsonargparse's complaints about wrong settings into one sentence with the nearest correct setting."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import walk_tb

from popo_lightning.cli.expected_kinds import misfit, misnamed, no_subclass
from popo_lightning.cli.missing_packages import needs
from popo_lightning.cli.settings_alone import settings_alone
from popo_lightning.cli.union_errors import UNION, of_union
from popo_lightning.core.did_you_mean import (
    arguments_of,
    did_you_mean,
    nearest,
    nearest_class,
    nearest_owner,
    nearest_setting,
)
from popo_lightning.core.errors import SettingError, own_refusal, reason

OURS = ("popo_lightning", "lightning", "torch", "transformers")
# Groups that null does not switch off, and what does.
OFF = {
    "checkpoint": "to write no checkpoints, set checkpoint.save_top_k to 0",
    "evaluation": "to evaluate before and after training only, set evaluation.every_n_iterations to 0",
    "samples": "to write no samples, set samples.every_n_iterations to 0",
    "monitor": "leave it out",
    "progress": "leave it out",
    "trainer": "leave it out",
    "model": "leave it out",
    "data": "leave it out",
    "run": "leave it out",
}


@dataclass(frozen=True)
class Command:
    """The command line that was misunderstood.

    Args:
        name: Name of the command as the user called it, such as "popo fit".
        options: Settings and options by command, without dashes and values.
        given: Arguments of the command line.
        others: Gives the options of further commands; called only for an option that `options` lacks.
    """

    name: str
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    given: Sequence[str] = ()
    others: Callable[[], Mapping[str, Sequence[str]]] = dict


def explained(message: str, command: Command) -> str:
    """Returns one sentence that begins with the setting and suggests the nearest name for a wrong one.

    Args:
        message: jsonargparse's message, over several lines.
        command: Command that the user called.
    """
    text = one_line(message)
    if (alone := settings_alone(_setting(text), message)) is not None:
        return alone
    for rule in RULES:
        found = rule(text, command)
        if found is not None:
            return found
    nested = re.match(r"(?:[\w.]+: )+", text)
    return text if nested is None else _about(text) + text[nested.end() :]


@contextmanager
def constructors_refusals() -> Iterator[None]:
    """Turns jsonargparse's errors from constructors, and Lightning's about its classes, into one sentence."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else "Lightning"
        raise SettingError(f"{owner} refuses its settings: {reason(error)}") from error
    except ValueError as error:
        nested = str(error).startswith(("Does not validate", "Problem with given"))
        if own_refusal(error) is not None or not nested:
            raise
        raise SettingError(explained(str(error), Command("popo"))) from error


def one_line(message: str) -> str:
    """Puts a nested message on one line and removes what its nesting repeats."""
    text = re.sub(r"\s+", " ", message.strip())
    text = re.sub(r"Expected a path but \S+ either not accessible or invalid", "", text)
    text = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", text)
    text = re.sub(r"Type typing\.Callable\[.*?\] expects a function or a callable class: ", "", text)
    text = UNION.sub(of_union, text)
    text = re.sub(r"(Expected) an? (?:<class '([^']*)'>|typing\.)", r"\1 \2", text)
    text = re.sub(r"(Got value: .*?)\. Got value: .*$", r"\1", text)
    return re.sub(r":\s+(-\s+)+", ": ", text)


def _setting(text: str) -> str:
    """The setting that a message is about, with its parents, such as "data.composer.buffer"."""
    bare = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    found = re.match(r"(?:[\w.]+: )+", bare)
    first, *others = found.group().rstrip(": ").split(": ") if found else [""]
    inner = ".".join(others)
    return first if not inner or f".{first}".endswith(f".{inner}") else f"{first}.{inner}"


def _about(text: str) -> str:
    return f"{setting}: " if (setting := _setting(text)) else ""


# -- rules: each returns a sentence, or None for a message that it does not apply to ---------------------------------


def _unknown_option(text: str, command: Command) -> str | None:
    found = re.match(r"unrecognized arguments: (\S+)", text)
    if found is None:
        return None
    given = found.group(1).partition("=")[0]
    name = given.lstrip("-")
    if name in command.options.get(command.name, ()):
        return f"{given} is no option of {command.name}; write it with two dashes, as --{name}"
    if not given.startswith("-"):
        return f"'{given}' is no option of {command.name}; a setting is given as --name value"
    elsewhere = [other for other, options in {**command.options, **command.others()}.items() if name in options]
    if elsewhere:
        return f"{given} is an option of {' and '.join(elsewhere)}, not of {command.name}; leave it out"
    return f"{given} is no option of {command.name}; {_instead(name, command, '--')}"


def _unknown_key(text: str, command: Command) -> str | None:
    found = re.search(r"does not accept option '([^']+)'", text)
    if found is None:
        return None
    return f"{found.group(1)} is no setting of {command.name}; {_instead(found.group(1), command, '')}"


def _instead(name: str, command: Command, dashes: str) -> str:
    options = command.options.get(command.name, ())
    near = nearest_setting(name, options) or nearest_owner(name, options)
    return f"did you mean {dashes}{near}?" if near else f"{command.name} --help lists them all"


def _group(text: str, command: Command) -> str | None:
    found = re.match(r"(\w+): Unable to load config '([^']*)'", text)
    if found is None:
        return None
    name, value = found.groups()
    if value in ("null", "None", "~"):
        return no_group(name)
    return f"{name} is '{value}', but it is a group of settings; give them one by one, as --{name}.NAME VALUE"


def no_group(name: str) -> str:
    """Says that null does not switch a group of settings off."""
    return f"{name} is null, but it is a group of settings; {OFF.get(name, 'leave it out')}"


def _missing_package(text: str, command: Command) -> str | None:
    found = re.search(r"class_path '([^']+)': Requirement '([\w.-]+)([^']*)' not met", text)
    if found is not None:
        return f"{_about(text)}{found.group(1).rpartition('.')[2]} {needs(found.group(2), found.group(3))}"
    found = re.search(r"No module named '(\w+)(?:\.[\w.]+)?'", text)
    if found is None or importlib.util.find_spec(found.group(1)) is not None:
        return None
    package = found.group(1)
    near = nearest(package, OURS)
    if near is not None and abs(len(near) - len(package)) < 2:  # a misspelt name
        return None
    wanted = re.search(rf"({package}\.[\w.]+)", text)
    return f"{_about(text)}{wanted.group(1) if wanted else package} {needs(package, '')}"


def _required_setting(text: str, command: Command) -> str | None:
    found = re.match(r"the following arguments are required: ([\w., ]+)$", text)
    if found is None:
        return None
    prefix = f"{command.name.rpartition(' ')[2]}."
    names = ", ".join(name.removeprefix(prefix) for name in found.group(1).split(", "))
    example = "compare/quick" if prefix == "compare." else "task/countdown_tiny"
    return f"{command.name} needs {names}; name a file that has it by --config, such as {example} (see popo configs)"


def _unknown_class(text: str, command: Command) -> str | None:
    for pattern in (
        r"class_path '([^']+)': (?:module '[^']+' has no attribute|No module named)",
        r"module '([^']+)' has no attribute '(\w+)'",
        r"Expected a dot import path string:\s*(.*?)(?:\. Got value.*)?$",
    ):
        found = re.search(pattern, text)
        if found is not None:
            given = ".".join(found.groups()).strip()
            break
    else:
        return None
    if not re.fullmatch(r"[A-Za-z_][\w.]*", given):
        return f"{_setting(text)} is '{given}', but a class belongs there: class_path and init_args, or its import path"
    near = nearest_class(given)
    end = f"did you mean {near}?" if near else "give its import path, as package.module.Class"
    return f"{_about(text)}there is no class '{given}'; {end}"


def _unknown_argument(text: str, command: Command) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", text)
    found = found or re.search(r"class_path '[^']+': unrecognized arguments: --([\w.]+)", text)
    if found is None:
        return None
    given = found.group(1)
    owner = re.findall(r"class_path[=' ]+([\w.]+)'", text)
    name = owner[-1].rpartition(".")[2] if owner else "its class"
    known = arguments_of(owner[-1]) if owner else []
    first = given.partition(".")[0]
    given = given if first in known else first  # the misspelt part
    written = nearest(first, ("class_path", "init_args", "dict_kwargs"))
    if first not in known and written is not None:
        return f"{_about(text)}a class is given by class_path and init_args, not {first}; did you mean {written}?"
    return f"{_about(text)}{name} has no setting '{given}'; " + did_you_mean(
        given, known, f"it has {', '.join(known) or 'none'}"
    )


def _no_class(text: str, command: Command) -> str | None:
    found = re.search(r"Not a valid subclass of (\w+)\. Got value: (.*?) Subclass types", text)
    if found is None:
        return None
    kind, value = found.groups()
    value = "null" if value == "None" else f"'{value}'"
    return (
        f"{_setting(text)} is {value}, but a {kind} belongs there: give its class_path and init_args, or leave it out"
    )


def _required_argument(text: str, command: Command) -> str | None:
    found = re.search(r"class_path '([^']+)': the following arguments are required: ([\w, ]+)", text)
    if found is None:
        return None
    owner, names = found.group(1).rpartition(".")[2], found.group(2).strip()
    return f"{_about(text)}{owner} needs {names}; set {_setting(text)}.{names.partition(',')[0]}"


def _no_value(text: str, command: Command) -> str | None:
    found = re.match(r"argument (\S+): expected one argument", text)
    if found is None:
        return None
    name = found.group(1).rpartition("/")[2]
    for option, value in zip(command.given, [*command.given[1:], ""], strict=False):
        if option == name or option.startswith(f"{name}."):
            if value.startswith("-") and not value.startswith("--"):
                return f"{option} is followed by {value}, which looks like an option; write it as {option}={value}"
            if not value or value.startswith("-"):
                return f"{option} has no value; write one after it, as {option} VALUE"
    return f"{name} has no value; write one after it, as {name} VALUE"


def _misfit(text: str, command: Command) -> str | None:
    return misfit(_setting(text), text)


def _misnamed(text: str, command: Command) -> str | None:
    inline = re.match(r"config: ((?:while|expected|mapping|could|did) .*)", text)
    if inline is not None:
        return f"--config is written inline and is no YAML ({inline.group(1)}); close its brackets and quotes"
    return misnamed(_setting(text), text)


def _no_subclass(text: str, command: Command) -> str | None:
    return no_subclass(_setting(text), text)


RULES: tuple[Callable[[str, Command], str | None], ...] = (
    _unknown_option,
    _unknown_key,
    _group,
    _missing_package,
    _unknown_argument,
    _required_argument,
    _required_setting,
    _no_class,
    _unknown_class,
    _no_value,
    _no_subclass,
    _misfit,
    _misnamed,
)
