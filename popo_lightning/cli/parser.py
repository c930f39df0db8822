"""The command-line parser: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from popo_lightning.cli.class_faults import Maker
from popo_lightning.cli.parser_sentences import Command, explained
from popo_lightning.core.errors import SettingError
from popo_lightning.core.one_voice import speak

CLI_SETTINGS: dict[str, Any] = {  # of LightningCLI, for whoever reads settings
    "seed_everything_default": 1,
    "auto_configure_optimizers": False,
    "load_from_checkpoint_support": False,  # a checkpoint's settings must not override the command line's
    "parser_kwargs": {"prog": "popo"},
}


class OneSentenceParser(LightningArgumentParser):
    """Refuses bad settings in one sentence. Abbreviations are refused too, because their meaning can change."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self.given: list[str] = []  # the command line
        self.maker: Maker | None = None

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """As usual; notes what it is given, for sentences about it."""
        self.given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_args(args, *others, **kwargs)

    def instantiate(self, *args: Any, instantiators: Any = None, **kwargs: Any) -> Any:
        """As usual; by the maker, if there is one."""
        if instantiators is None and self.maker is not None:
            instantiators = [(self.maker, object, True)]
        return super().instantiate(*args, instantiators=instantiators, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the sentence and exits with code 2; a parser within a parser raises instead, for the outer to decide.

        Raises:
            argparse.ArgumentError: Of a parser made with `exit_on_error=False`.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.refuse(explained(message, command_of(self)))

    def refuse(self, sentence: str) -> NoReturn:
        """What happens to the user's mistake."""
        refuse(sentence)


class RaisingParser(OneSentenceParser):
    """Raises, so that others can say the sentence."""

    def refuse(self, sentence: str) -> NoReturn:
        """The sentence as an error."""
        raise SettingError(sentence)


def command_of(parser: Any) -> Command:
    """What the user called, and what there is to call, for sentences about what is not."""
    top = getattr(parser, "parent_parser", parser)
    subcommands = getattr(top, "_subcommands_action", None)
    parsers = dict(subcommands.choices) if subcommands else {}
    parts = {f"{top.prog} {name}": part for name, part in parsers.items()} or {top.prog: top}
    options = {
        name: [option.lstrip("-") for action in part._actions for option in action.option_strings]
        for name, part in parts.items()
    }
    called = getattr(parser, "subcommand", None) or next((arg for arg in top.given if arg in parsers), None)
    return Command(f"{top.prog} {called}" if called else top.prog, options, top.given)


def refuse(sentence: str) -> NoReturn:
    """One sentence, by one rank, and exit code 2."""
    speak(sentence)
    sys.exit(2)
