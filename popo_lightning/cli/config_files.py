"""Checks config files before they are parsed, and reports a fault with file, line and remedy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from popo_lightning.cli.config_nodes import check_nodes
from popo_lightning.cli.parser_sentences import GROUPS, no_group
from popo_lightning.cli.settings_alone import check_methods
from popo_lightning.cli.shipped_configs import named_configs, shipped, shipped_folder, shown_path
from popo_lightning.core.did_you_mean import nearest
from popo_lightning.core.errors import SettingError, reason

SUBCOMMANDS = {"fit", "validate", "test", "predict"}
METHODS = "method"  # folder whose files each describe a whole method
OF_A_RUN = (*GROUPS, "proximal", "parameter_hook")
COMPARISON = {"methods", "seeds"}
LARGEST = 2**22  # bytes of a config file


def check_config_files(args: Sequence[str], groups: Collection[str] = ()) -> None:
    """Raises SettingError for a faulty config file, or for two that contradict each other.

    Args:
        args: Arguments of the command line.
        groups: Top-level groups of settings, which null does not switch off.
    """
    methods: dict[str, str] = {}
    _check_place(args)
    for _, _, name in named_configs(args):
        content = _read(name, groups)
        if content.keys() >= COMPARISON and SUBCOMMANDS & set(args):
            raise _wrong(name, f"which is a comparison; run it by popo compare --config {quote(name)}")
        run = content.get("run")
        if Path(name).absolute().parent.name == METHODS and isinstance(run, dict) and run.get("method"):
            methods[str(run["method"])] = name
    if len(methods) > 1:
        first, second, *_ = methods.values()
        raise SettingError(
            f"--config names the methods '{first}' and '{second}', and settings of the first would stay where the "
            "second has none; leave one out, or put what you want of both into a file of your own"
        )


def check_comparison_files(args: Sequence[str]) -> None:
    """Raises SettingError if popo compare is given a file of popo fit, or methods without settings.

    Args:
        args: Command line of popo compare.
    """
    for _, _, name in named_configs(args):
        content = _read(name, ())
        if found := [key for key in content if key in OF_A_RUN]:
            raise _wrong(
                name,
                f"which has settings of a run ({', '.join(found)}), but popo compare needs a comparison: a file with "
                "name, task, methods and seeds, such as compare/quick (popo configs compare lists some); a run of this "
                f"one is made by popo fit --config {quote(name)}",
            )
        check_methods(content.get("methods"))


def _check_place(args: Sequence[str]) -> None:
    """Raises SettingError for a subcommand's file before the subcommand, where a file must name subcommands."""
    place, subcommand = next(((place, arg) for place, arg in enumerate(args) if arg in SUBCOMMANDS), (0, ""))
    before = next((name for _, _, name in named_configs(args[:place])), None)
    if before is not None and not SUBCOMMANDS & _read(before, ()).keys():
        raise SettingError(
            f"--config {before} comes before {subcommand}; write it after: popo {subcommand} --config {quote(before)}"
        )


def _read(name: str, groups: Collection[str]) -> dict[str, Any]:
    file = Path(name)
    if not name:
        raise SettingError("--config is empty, which names no file; leave it out")
    if file.is_dir():
        raise _wrong(name, "which is a folder; name one of its files")
    if not file.exists():
        near = nearest(_without_suffix(name), known := _known_files())
        remedy = f"did you mean {known[near]}?" if near else "name a YAML file, or one that popo configs lists"
        raise _wrong(name, f"which does not exist; {remedy}")
    if not file.is_file():
        raise _wrong(name, "a device or a pipe, which is read once only; name a regular file")
    if file.stat().st_size > LARGEST:
        raise _wrong(name, f"which has {file.stat().st_size} bytes, too many for settings; name a YAML file")
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        said = "whose brackets are nested too deeply; write each setting as 'name: value'"
        raise _wrong(name, said) from error
    except yaml.MarkedYAMLError as error:
        raise _no_yaml(name, text, error) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = f"which cannot be read as a YAML file ({reason(error)}); write one in UTF-8"
        raise _wrong(name, said) from error
    if root is None:
        raise _wrong(name, "which is empty; leave it out")
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise _wrong(
            name, f"whose line {line} is no setting; write each as 'name: value', with a space after the colon"
        )
    check_nodes(name, root)
    for key, value in root.value:
        empty = isinstance(value, yaml.MappingNode) and not value.value  # which the parser takes under any name
        if groups and empty and key.value not in (*OF_A_RUN, *SUBCOMMANDS):
            near = nearest(str(key.value), OF_A_RUN)
            remedy = f"did you mean {near}?" if near else "leave it out"
            line = key.start_mark.line + 1
            raise _wrong(name, f"whose line {line} has '{key.value}', which is no group of settings; {remedy}")
        if key.value in groups and value.tag.endswith(":null"):
            raise _wrong(name, f"where {no_group(key.value)}")
        if key.value in groups and not isinstance(value, yaml.MappingNode):
            raise _wrong(
                name,
                f"whose line {value.start_mark.line + 1} gives {key.value} no names, but it is a group of settings; "
                "write each below it as 'name: value', with a space after the colon",
            )
    try:
        found: dict[str, Any] = yaml.load(text, Loader=_Plain)
    except yaml.MarkedYAMLError as error:
        raise _no_yaml(name, text, error) from error
    except ValueError as error:  # a number with thousands of digits
        raise _wrong(name, f"which has a value that is none ({reason(error)}); correct it") from error
    return found


def _wrong(name: str, what: str) -> SettingError:
    return SettingError(f"--config is '{name}', {what}")


class _Plain(yaml.SafeLoader):
    """Loads values with unknown tags, such as jsonargparse's, as null."""


_Plain.add_constructor(None, lambda loader, node: None)


def _no_yaml(name: str, text: str, error: yaml.MarkedYAMLError) -> SettingError:
    mark = error.problem_mark or error.context_mark
    place = mark.line if mark else 0
    line = (text.splitlines() or [""])[min(place, text.count("\n") - 1 if place else 0)]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        remedy = "indent with spaces, not with a tab"
    elif error.context and "flow" in error.context:
        remedy = f"close the bracket of line {(error.context_mark or mark).line + 1}"
    else:
        remedy = "write each setting as 'name: value', and indent those of a group alike"
    return _wrong(name, f"whose line {place + 1} is no YAML ({error.problem}): {line.strip()!r}; {remedy}")


def _known_files() -> dict[str, str]:
    """Shipped config files and those in this folder, by path without suffix and by name."""
    found = {name: name for name in shipped()}
    for folder in (shipped_folder(), Path("configs"), Path()):
        for file in sorted(folder.glob("**/*.yaml" if folder.name == "configs" else "*.yaml")):
            shown = shown_path(file)
            found[_without_suffix(shown)] = shown
            if folder.name == "configs":
                found.setdefault(_without_suffix(str(Path("configs") / file.relative_to(folder))), shown)
    return found


def _without_suffix(name: str) -> str:
    return str(Path(name).with_suffix("")) if Path(name).suffix in (".yaml", ".yml", ".json") else name
