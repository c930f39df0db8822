"""Finds the fenced blocks and commands of Markdown pages and checks whether each would be accepted. Nothing is run.

A block after a line ``<!-- not run: REASON -->`` is not checked.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from helpers.places import REPOSITORY
from popo_lightning.cli.completion import SHELLS
from popo_lightning.cli.shipped_configs import with_config_paths
from popo_lightning.core.errors import SettingError

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:popo|python|bash|SEED=\d+ bash) [^`]*)`(?!`)")
NOT_RUN = re.compile(r"<!--\s*not run:?\s*(.*?)\s*-->\s*\Z", re.DOTALL)
SHELL, YAML = ("bash", "sh", "shell", "console"), ("yaml", "yml")
# Shell words and other programs, whose arguments are not checked.
FOREIGN = """apt apt-get cat cp curl docker exit export git head huggingface-cli hf less ls mkdir mkdocs mypy nvidia-smi
pre-commit pytest ruff scontrol source ssh tail tensorboard test trap uv"""
WITHOUT_CONFIG = ("export", "sample", "estimate", "completion")
LAUNCHERS = ("srun", "torchrun")
BASE = ["--config", "configs/task/countdown_tiny.yaml", "--config", "configs/method/popo.yaml"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Block:
    """The text between two fences, or one inline command."""

    line: int
    language: str
    text: str
    not_run: str | None = None


def blocks(text: str) -> Iterator[Block]:
    """Yields fenced blocks, then inline commands with options, which may omit the configurations.

    `not_run` is the reason in a marker before a block, perhaps empty. It is null without a marker.
    """
    for found in FENCE.finditer(text):
        marker = NOT_RUN.search(text[: found.start()])
        body = textwrap.dedent(found[3])
        yield Block(text.count("\n", 0, found.start()) + 1, found[2], body, marker and marker[1])
    outside = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in INLINE.finditer(outside):
        if "--" in found[1]:
            command = " ".join(found[1].split())
            if "--config" not in command and command.split()[1] not in WITHOUT_CONFIG:
                command = re.sub(r"^(popo \w+) (?!\.\.\.)", r"\1 ... ", command)
            yield Block(outside.count("\n", 0, found.start()) + 1, "bash", command)


def expanded(text: str) -> list[str]:
    """Returns a line for each word in braces, {a,b}, as bash expands them, with 1 for each variable."""
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    braces = re.search(r"\{([\w.]+(?:,[\w.]+)+)\}", text)
    if not braces:
        return [text]
    return [line for word in braces[1].split(",") for line in expanded(text.replace(braces[0], word, 1))]


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell text, without leading variables and redirections."""
    for whole in re.sub(r"\\\n", " ", text).splitlines():
        for line in expanded(whole.removeprefix("$ ")):
            split = shlex.shlex(line, posix=True, punctuation_chars=True)
            split.whitespace_split = True
            words: list[str] = []
            for word in [*split, ";"]:
                if word in (";", "&", "&&", "|", "||"):
                    yield from _command(words)
                    words = []
                else:
                    words.append(word)


def _command(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in ("do", "then", "else", "exec", "time", "nohup", "!") or re.match(r"\w+=", words[0])):
        words = words[1:]
    for place, word in enumerate(words):
        if set(word) <= set("<>&") or word in ("2>", "1>"):
            words = words[:place]
            break
    if words and words[0] not in ("for", "if", "while", "done", "fi"):
        yield words


class Checker:
    """Reports what is wrong with each block of a page.

    Args:
        popo: Takes the arguments of a popo command and whether its classes are built; raises SettingError.
        enter: Called with the folder of each `cd`.
        scratch: Folder for files with settings.
    """

    def __init__(
        self, popo: Callable[[Sequence[str], bool], dict[str, Any]], enter: Callable[[Path], None], scratch: Path
    ) -> None:
        self._popo, self._enter, self._scratch = popo, enter, scratch

    def page(self, text: str) -> list[str]:
        """Returns LINE: SENTENCE for each refusal. Settings are tried after the page's first fit command."""
        self._fit, self._where = ["fit", *BASE], REPOSITORY
        found = [block for block in blocks(text) if block.not_run is None]
        complaints = [f"{one.line}: say why it is not run" for one in blocks(text) if one.not_run == ""]
        self._modules(found)
        first = True
        for block in sorted(found, key=lambda one: one.language not in SHELL):  # commands, then settings
            self._enter(REPOSITORY)
            try:
                if block.language in SHELL:
                    for words in commands(block.text):
                        if Path(words[0]).name == "popo" and words[1:2] == ["fit"] and first and "..." not in words:
                            self._fit, self._where, first = words[1:], Path.cwd(), False
                        self._words(words)
                elif block.language in YAML:
                    self._settings(block)
                elif block.language == "python":
                    ast.parse(block.text)
                elif block.language == "json":
                    json.loads(block.text)
            except (SettingError, SyntaxError, ValueError, yaml.YAMLError) as error:
                complaints.append(f"{block.line}: {' '.join(str(error).split())}")
        return complaints

    def _modules(self, found: Sequence[Block]) -> None:
        """Writes Python whose first line names its file, so that the page's commands can use it."""
        folder = self._scratch / "modules"
        folder.mkdir(exist_ok=True)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        for block in found:
            if block.language == "python" and (name := re.match(r"# (\w+)\.py\n", block.text)):
                (folder / f"{name[1]}.py").write_text(block.text)
                sys.modules.pop(name[1], None)
        importlib.invalidate_caches()

    def _words(self, words: list[str]) -> None:
        program, arguments = words[0], words[1:]
        if program == "cd":
            self._enter(Path.cwd() / arguments[0])
        elif program in LAUNCHERS or words[1:3] == ["-m", "popo_lightning"]:
            start = "popo_lightning" if "popo_lightning" in arguments else "popo"
            self.command(arguments[arguments.index(start) + 1 :])
        elif Path(program).name == "popo":
            self.command(arguments)
        elif Path(program).name in ("python", "python3", "bash") and arguments and not arguments[0].startswith("-"):
            self._script(arguments[0], arguments[1:])
        elif "/" in program and Path(program).suffix:
            self._script(program, arguments)
        elif Path(program).name in ("pip", "python", "python3"):
            _pip(arguments)
        elif Path(program).name not in FOREIGN.split():
            raise SettingError(f"{program} is no command that the tests know; mend it, or mark the block as not run")

    def command(self, arguments: list[str], built: bool = False) -> None:
        """Checks one popo command. "..." is the command above it, CAPITALS in a path match any file, and N is 1."""
        if arguments == ["--version"]:
            return  # answered before there is a parser
        if not arguments:
            raise SettingError("popo needs a subcommand")
        if arguments[0] == "completion":
            if unknown := set(arguments[1:]) - {*SHELLS, "--help"}:
                raise SettingError(f"popo completion knows no {', '.join(sorted(unknown))}")
            return
        if arguments[1:2] == ["..."]:
            arguments = [arguments[0], *(BASE if arguments[0] != "compare" else []), *arguments[2:]]
        self._popo(with_config_paths([_path(word) for word in arguments if word != "..."]), built)

    def _script(self, name: str, arguments: list[str]) -> None:
        file = Path(name)
        if not file.is_file():
            raise SettingError(f"{name} is not there")
        options = {word.split("=")[0] for word in arguments if word.startswith("--")}
        if file.suffix == ".py" and (missing := [one for one in sorted(options) if f'"{one}"' not in file.read_text()]):
            raise SettingError(f"{name} has no {', '.join(missing)}")

    def _settings(self, block: Block) -> None:
        found = yaml.safe_load(block.text)
        if not isinstance(found, dict) or not found:
            return
        file = self._scratch / "block.yaml"
        file.write_text(block.text)
        if found.keys() & {"methods", "seeds", "sweep"}:
            whole = found.keys() >= {"name", "task", "methods", "seeds"}
            below = [] if whole else ["--config", str(REPOSITORY / "configs/compare/quick.yaml")]
            self.command(["compare", *below, "--config", str(file)])
        elif found.keys() & self._popo(["fit", *BASE], False).keys():
            self._enter(self._where)
            self.command([*self._fit, "--config", str(file)], built=True)


def _path(word: str) -> str:
    if re.fullmatch(r"(\.\./)*runs/.*config\.yaml", word):  # a config of a finished run
        return str(REPOSITORY / BASE[1])
    if not word.endswith(".yaml") or Path(word).is_absolute() or not re.search(r"[A-Z]{2}", word):
        return "1" if word == "N" else word
    return str(next(Path.cwd().glob(re.sub(r"[A-Z][A-Z_]+", "*", word)), word))


def _pip(arguments: Sequence[str]) -> None:
    for option, value in pairwise(arguments):
        if option in ("-c", "-r", "--constraint", "--requirement") and not Path(value).is_file():
            raise SettingError(f"{value} is not there")
    for extras in re.findall(r"(?:^|\s)(?:\.|popo_lightning)\[([\w,-]+)\]", " ".join(arguments)):
        if unknown := set(extras.split(",")) - PROJECT["optional-dependencies"].keys():
            raise SettingError(f"pyproject.toml has no extra {', '.join(sorted(unknown))}")
