"""The command lines of `popo export` and `popo sample`, without torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from popo_lightning.core.did_you_mean import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
ENGINES = ("transformers", "vllm")
SOURCE = "RUN_OR_CHECKPOINT"


class CommandLine(argparse.ArgumentParser):
    """Reports a mistake in one sentence, with exit code 2."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"popo {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints the sentence and exits."""
        print(f"popo: {self._sentence(message)}", file=sys.stderr)
        sys.exit(2)

    def _sentence(self, message: str) -> str:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            given = unknown.split()[0].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            there = f"{self.prog} --help lists them all"
            return f"{given} is no option of {self.prog}; {did_you_mean(given, options, there)}"
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            return f"{self.prog} needs {missing}; {' '.join(self.format_usage().split())}"
        return message.removeprefix("argument ")


def export_options(args: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of `popo export`.

    Args:
        args: Arguments after the subcommand.
    """
    return export_parser().parse_args(list(args))


def export_parser() -> CommandLine:
    """Parser of `popo export`."""
    made = CommandLine("export", "Writes a trained policy as a transformers folder.")
    made.add_argument("source", metavar=SOURCE, help="A run's folder, whose newest checkpoint counts, or a checkpoint.")
    made.add_argument("folder", metavar="FOLDER", help="Where to write; a folder that is not there yet, or is empty.")
    made.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        metavar="{" + ",".join(DTYPES) + "}",
        help="Type of the written weights (default: as in the checkpoint, bit for bit).",
    )
    made.add_argument(
        "--best",
        action="store_true",
        help="Of the checkpoints that a run has kept, the best by checkpoint.monitor, or else by its evaluations.",
    )
    made.add_argument(
        "--adapter",
        action="store_true",
        help="Write the adapters alone, for peft, of a run with model.lora (default: weights that they are added to).",
    )
    _add_base(made)
    made.add_argument("--push_to_hub", metavar="NAME", help="Also upload it to NAME on the hub, private if it is new.")
    return made


def sample_options(args: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of `popo sample`.

    Args:
        args: Arguments after the subcommand.
    """
    return sample_parser().parse_args(list(args))


def sample_parser() -> CommandLine:
    """Parser of `popo sample`."""
    made = CommandLine("sample", "Asks a trained policy a question, as its run asked, and prints the answers.")
    made.add_argument("source", metavar=SOURCE, help="A run's folder, whose newest checkpoint counts, or a checkpoint.")
    made.add_argument("prompt", metavar="PROMPT", help="The question; - reads it from the standard input.")
    made.add_argument("--n", type=_whole(), default=4, help="Answers (default: 4).")
    made.add_argument(
        "--temperature", type=_temperature, default=1.0, help="Of sampling; 0 is the likeliest answer (default: 1)."
    )
    made.add_argument(
        "--max_new_tokens",
        type=_whole(),
        metavar="TOKENS",
        help="Longest answer in tokens (default: the run's data.max_new_tokens).",
    )
    made.add_argument("--image", action="append", default=[], metavar="FILE", help="Of the question; may be repeated.")
    made.add_argument("--gold", metavar="ANSWER", help="The right answer: the run's verifier then grades each answer.")
    made.add_argument(
        "--engine",
        type=one_of(ENGINES),
        default="transformers",
        metavar="{" + ",".join(ENGINES) + "}",
        help="What samples (default: transformers).",
    )
    made.add_argument("--seed", type=_whole(0), default=1, help="Of the draws (default: 1).")
    made.add_argument("--best", action="store_true", help="As popo export.")
    _add_base(made)
    return made


def _add_base(made: CommandLine) -> None:
    made.add_argument(
        "--base",
        metavar="FOLDER_OR_HUB_ID",
        help="Where the model that the run began with now is, if it is no longer where the run found it.",
    )


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Returns a function that reads one of several words.

    Args:
        known: The words.
    """

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"'{text}' is not known; use {', '.join(known[:-1])} or {known[-1]}")
        return text

    return read


def _whole(least: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least}; use one")
        return int(text)

    return read


def _temperature(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no temperature; use 0 for the likeliest answer, or more")
    return found
