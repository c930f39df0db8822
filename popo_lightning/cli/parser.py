"""The command-line parser: a user's mistake gives one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse._common import parser_context
from lightning.pytorch.cli import LightningArgumentParser

from popo_lightning.cli.class_faults import Maker
from popo_lightning.cli.help_texts import HELP_ALL, own_help
from popo_lightning.cli.parser_sentences import Command, explained
from popo_lightning.core.errors import SettingError
from popo_lightning.core.rank_refusals import print_refusal


class OneSentenceParser(LightningArgumentParser):
    """Refuses bad settings in one sentence. Abbreviations are refused too, because their meaning can change."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self.given: list[str] = []  # the command line
        self.maker: Maker | None = None
        self.others: Callable[[], dict[str, Any]] = dict  # gives the parsers of the subcommands that are not called
        self.everything = False  # whether help also shows Lightning's settings

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help of a subcommand's own settings, or of every setting with --help_all."""
        if self.everything or HELP_ALL not in self._option_string_actions:
            return super().format_help(*args, **kwargs)
        with parser_context(parent_parser=self):
            return own_help(self)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parses as usual, and keeps the arguments for error messages."""
        self.given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_args(args, *others, **kwargs)

    def instantiate(self, *args: Any, instantiators: Any = None, **kwargs: Any) -> Any:
        """Instantiates as usual, with the maker if there is one."""
        if instantiators is None and self.maker is not None:
            instantiators = [(self.maker, object, True)]
        return super().instantiate(*args, instantiators=instantiators, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the sentence and exits with code 2; a nested parser raises instead, and the outer one decides.

        Raises:
            argparse.ArgumentError: The parser was made with `exit_on_error=False`.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.refuse(explained(message, command_of(self)))

    def refuse(self, sentence: str) -> NoReturn:
        """Refuses a user's mistake."""
        refuse(sentence)


class RaisingParser(OneSentenceParser):
    """Raises SettingError instead of printing, so that the caller can report it."""

    def refuse(self, sentence: str) -> NoReturn:
        """Raises the sentence as an error."""
        raise SettingError(sentence)


def command_of(parser: Any) -> Command:
    """What the user called, and the options that exist, for sentences about unknown ones."""
    top = getattr(parser, "parent_parser", parser)
    subcommands = getattr(top, "_subcommands_action", None)
    parsers = dict(subcommands.choices) if subcommands else {}

    def options(parts: dict[str, Any]) -> dict[str, list[str]]:
        return {
            f"{top.prog} {name}".rstrip(): [
                option.lstrip("-") for action in part._actions for option in action.option_strings
            ]
            for name, part in parts.items()
        }

    called = getattr(parser, "subcommand", None) or next((arg for arg in top.given if arg in parsers), None)
    name = f"{top.prog} {called}" if called else top.prog
    return Command(name, options(parsers or {"": top}), top.given, lambda: options(top.others()))


def refuse(sentence: str) -> NoReturn:
    """Prints one sentence on one rank, and exits with code 2."""
    print_refusal(sentence)
    sys.exit(2)
