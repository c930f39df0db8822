"""Turns jsonargparse's complaints about wrong settings into one sentence with the nearest correct setting."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from popo_lightning.cli.expected_kinds import misfit, misnamed, no_subclass
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

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints"
Found = re.Match[str]
OURS = ("popo_lightning", "lightning", "torch", "transformers")
# Groups of settings, which null does not switch off, and what does.
GROUPS = ("run", "model", "data", "trainer", "evaluation", "checkpoint", "samples", "progress", "monitor")
OFF = {
    "checkpoint": "to write no checkpoints, set checkpoint.save_top_k to 0",
    "evaluation": "to evaluate before and after training only, set evaluation.every_n_iterations to 0",
    "samples": "to write no samples, set samples.every_n_iterations to 0",
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
    setting = _setting(text)
    if (alone := settings_alone(setting, message)) is not None:
        return alone
    for pattern, rule in RULES:
        found = re.search(pattern, text)
        if found is not None and (sentence := rule(found, text, command)) is not None:
            return sentence
    for of_value in (no_subclass, misfit, misnamed):
        if (sentence := of_value(setting, text)) is not None:
            return sentence
    nested = re.match(r"(?:[\w.]+: )+", text)
    return text if nested is None else _about(text) + text[nested.end() :]


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


# -- rules: each makes a sentence of what its pattern found in a message, or None if it does not apply after all -------


def _unknown_option(found: Found, text: str, command: Command) -> str:
    given = found[1].partition("=")[0]
    name = given.lstrip("-")
    if name in command.options.get(command.name, ()):
        return f"{given} is no option of {command.name}; write it with two dashes, as --{name}"
    if not given.startswith("-"):
        return f"'{given}' is no option of {command.name}; a setting is given as --name value"
    elsewhere = [other for other, options in {**command.options, **command.others()}.items() if name in options]
    if elsewhere:
        return f"{given} is an option of {' and '.join(elsewhere)}, not of {command.name}; leave it out"
    return f"{given} is no option of {command.name}; {_instead(name, command, '--')}"


def _unknown_key(found: Found, text: str, command: Command) -> str:
    return f"{found[1]} is no setting of {command.name}; {_instead(found[1], command, '')}"


def _instead(name: str, command: Command, dashes: str) -> str:
    options = command.options.get(command.name, ())
    near = nearest_setting(name, options) or nearest_owner(name, options)
    return f"did you mean {dashes}{near}?" if near else f"{command.name} --help lists them all"


def _group(found: Found, text: str, command: Command) -> str:
    name, value = found.groups()
    if value in ("null", "None", "~"):
        return no_group(name)
    return f"{name} is '{value}', but it is a group of settings; give them one by one, as --{name}.NAME VALUE"


def no_group(name: str) -> str:
    """Says that null does not switch a group of settings off."""
    return f"{name} is null, but it is a group of settings; {OFF.get(name, 'leave it out')}"


def _needs(package: str, versions: str) -> str:
    """Says that a package is missing. The command is given for known names only: a misspelt one may be a stranger's."""
    known = [file.name for file in sorted(CONSTRAINTS.glob("*.txt")) if f"\n{package.lower()}==" in file.read_text()]
    if not versions and not known:
        return (
            f"is in no module that is here; start popo in the folder of {package}.py, or name that folder in "
            f"PYTHONPATH, or install the package that has {package}"
        )
    where = f" -c constraints/{known[0]}" if known else ""
    return f"needs the package {package}, which is not installed: pip install{where} " + (
        f"'{package}{versions}'" if versions else package
    )


def _missing_requirement(found: Found, text: str, command: Command) -> str:
    return f"{_about(text)}{found[1].rpartition('.')[2]} {_needs(found[2], found[3])}"


def _missing_package(found: Found, text: str, command: Command) -> str | None:
    package = found[1]
    if importlib.util.find_spec(package) is not None:
        return None
    near = nearest(package, OURS)
    if near is not None and abs(len(near) - len(package)) < 2:  # a misspelt name
        return None
    wanted = re.search(rf"({package}\.[\w.]+)", text)
    name = wanted[1] if wanted else package
    here = nearest(package, [file.stem for file in Path.cwd().glob("*.py")])
    near = name.replace(package, here, 1) if here else nearest_class(name) or ""
    if here or near.endswith(f".{name.rpartition('.')[2]}"):
        return f"{_about(text)}{name} is in no module that is here; did you mean {near}?"
    return f"{_about(text)}{name} {_needs(package, '')}"


def _required_setting(found: Found, text: str, command: Command) -> str:
    prefix = f"{command.name.rpartition(' ')[2]}."
    names = ", ".join(name.removeprefix(prefix) for name in found[1].split(", "))
    example = "compare/quick" if prefix == "compare." else "task/countdown_tiny"
    return f"{command.name} needs {names}; name a file that has it by --config, such as {example} (see popo configs)"


def _unknown_class(found: Found, text: str, command: Command) -> str:
    given = ".".join(found.groups()).strip()
    if not re.fullmatch(r"[A-Za-z_][\w.]*", given):
        return f"{_setting(text)} is '{given}', but a class belongs there: class_path and init_args, or its import path"
    near = nearest_class(given)
    end = f"did you mean {near}?" if near else "give its import path, as package.module.Class"
    return f"{_about(text)}there is no class '{given}'; {end}"


def _unknown_argument(found: Found, text: str, command: Command) -> str:
    given = found[1]
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


def _no_class(found: Found, text: str, command: Command) -> str:
    kind, value = found.groups()
    value = "null" if value == "None" else f"'{value}'"
    return (
        f"{_setting(text)} is {value}, but a {kind} belongs there: give its class_path and init_args, or leave it out"
    )


def _required_argument(found: Found, text: str, command: Command) -> str:
    owner, names = found[1].rpartition(".")[2], found[2].strip()
    return f"{_about(text)}{owner} needs {names}; set {_setting(text)}.{names.partition(',')[0]}"


def _no_value(found: Found, text: str, command: Command) -> str:
    name = found[1].rpartition("/")[2]
    for option, value in zip(command.given, [*command.given[1:], ""], strict=False):
        if option == name or option.startswith(f"{name}."):
            if value.startswith("-") and not value.startswith("--"):
                return f"{option} is followed by {value}, which looks like an option; write it as {option}={value}"
            if not value or value.startswith("-"):
                return f"{option} has no value; write one after it, as {option} VALUE"
    return f"{name} has no value; write one after it, as {name} VALUE"


def _inline_yaml(found: Found, text: str, command: Command) -> str:
    return f"--config is written inline and is no YAML ({found[1]}); close its brackets and quotes"


RULES: tuple[tuple[str, Callable[[Found, str, Command], str | None]], ...] = (
    (r"^unrecognized arguments: (\S+)", _unknown_option),
    (r"does not accept option '([^']+)'", _unknown_key),
    (r"^(\w+): Unable to load config '([^']*)'", _group),
    (r"class_path '([^']+)': Requirement '([\w.-]+)([^']*)' not met", _missing_requirement),
    (r"No module named '(\w+)(?:\.[\w.]+)?'", _missing_package),
    (r"Option '([^']+)' is not accepted", _unknown_argument),
    (r"class_path '[^']+': unrecognized arguments: --([\w.]+)", _unknown_argument),
    (r"class_path '([^']+)': the following arguments are required: ([\w, ]+)", _required_argument),
    (r"^the following arguments are required: ([\w., ]+)$", _required_setting),
    (r"Not a valid subclass of (\w+)\. Got value: (.*?) Subclass types", _no_class),
    (r"class_path '([^']+)': (?:module '[^']+' has no attribute|No module named)", _unknown_class),
    (r"module '([^']+)' has no attribute '(\w+)'", _unknown_class),
    (r"Expected a dot import path string:\s*(.*?)(?:\. Got value.*)?$", _unknown_class),
    (r"^argument (\S+): expected one argument", _no_value),
    (r"^config: ((?:while|expected|mapping|could|did) .*)", _inline_yaml),
)
