"""`popo completion`: a shell script that completes subcommands, settings, classes and configuration names."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import capture_parser
from jsonargparse._typehints import ActionTypeHint, get_all_subclass_paths

from popo_lightning.cli.shipped_configs import shipped

SHELLS = ("bash", "zsh")
DESCRIPTION = """Prints a script that completes popo's subcommands, settings, classes and shipped configurations.

bash:  popo completion bash > ~/.popo_completion && echo 'source ~/.popo_completion' >> ~/.bashrc
zsh:   popo completion zsh > ~/.zfunc/_popo, with ~/.zfunc in fpath before compinit"""
CONFIGS = "_popo_configs"  # shell function that lists files and shipped configurations
BASH = """{name}() {{
  local IFS=$' \\n'
  compgen -W {words} -- "$1"
  compgen -f -- "$1"
}}"""
ZSH = """{name}() {{
  compadd -- {words}
  _files
}}"""


def parser() -> argparse.ArgumentParser:
    """Parser of `popo completion`."""
    made = argparse.ArgumentParser("popo completion", description=DESCRIPTION, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    usual = Path(os.environ.get("SHELL", "")).name
    made.add_argument("shell", nargs="?", choices=SHELLS, default=usual if usual in SHELLS else "bash")
    return made


def main(args: Sequence[str], others: Callable[[], Mapping[str, tuple[str, Any]]]) -> int:
    """Runs `popo completion`.

    Args:
        args: Arguments after the subcommand.
        others: Gives the subcommands besides LightningCLI's, each with its purpose and its parser.
    """
    asked = parser().parse_args(list(args))
    print(script(asked.shell, others()))
    return 0


def script(shell: str, others: Mapping[str, tuple[str, Any]]) -> str:
    """Returns the completion script of a shell.

    Args:
        shell: One of SHELLS.
        others: Subcommands besides LightningCLI's, each with its purpose and its parser.
    """
    import shtab

    from popo_lightning.cli.popo_cli import PopoCLI

    top = argparse.ArgumentParser("popo", allow_abbrev=False)
    top.add_argument("--version", action="store_true")
    commands = top.add_subparsers(dest="subcommand")
    whole: Any = capture_parser(PopoCLI, [])  # of fit, validate, test and predict with all settings
    described = {name: ("", parser) for name, parser in whole._subcommands_action.choices.items()}
    for name, (about, described_parser) in (described | dict(others)).items():
        plain = commands.add_parser(name, help=about, add_help=False)
        for action in described_parser._actions:
            _copy(action, plain)
    names = list(shipped())
    function = {
        "bash": BASH.format(name=CONFIGS, words=shlex.quote(" ".join(names))),
        "zsh": ZSH.format(name=CONFIGS, words=" ".join(map(shlex.quote, names))),
    }
    made: str = shtab.complete(top, shell, preamble=function[shell])
    return made


def _copy(action: Any, target: argparse.ArgumentParser) -> None:
    """Copies an option or argument, with its choices if these are a short list.

    jsonargparse's own script also has the settings inside every class, and takes a minute to make.
    """
    if action.help == argparse.SUPPRESS:
        return
    kept: dict[str, Any] = {"help": str(action.help or "").partition(". ")[0].replace("%", "%%")}
    if action.nargs == 0:
        kept["action"] = "store_true"
    elif choices := list(action.choices or ()) or _choices(getattr(action, "_typehint", None)):
        kept["choices"] = choices
    added: Any = target.add_argument(*(action.option_strings or [action.dest]), **kept)
    if "--config" in action.option_strings:
        added.complete = {"bash": CONFIGS, "zsh": CONFIGS}
    elif action.type is Path or (not action.option_strings and action.dest in ("runs", "source", "folder")):
        added.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}


def _choices(kind: Any) -> list[str]:
    """Choices of a type: values of a flag, words of a Literal, or class names of a slot."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    found: list[str] = []
    for part in parts:
        if part is bool:
            found += ["true", "false"]
        elif get_origin(part) is Literal:
            found += map(str, get_args(part))
        elif part is not None and ActionTypeHint.is_subclass_typehint(part):
            found += [path.rpartition(".")[2] for path in get_all_subclass_paths(part)]
    return list(dict.fromkeys(found))
