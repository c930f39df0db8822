"""The command lines of `popo export` and `popo sample`, without torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from popo_lightning.core.did_you_mean import did_you_mean

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


def export_parser() -> CommandLine:
    """Parser of `popo export`."""
    made = CommandLine("export", "Writes a trained policy as a transformers folder.")
    made.add_argument("source", metavar=SOURCE, help="A run's folder, whose newest checkpoint counts, or a checkpoint.")
    made.add_argument("folder", metavar="FOLDER", help="Where to write; a folder that is not there yet, or is empty.")
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Type of the written weights (default: as in the checkpoint, bit for bit).",
    )
    add_policy_options(made)
    made.add_argument(
        "--adapter",
        action="store_true",
        help="Write the adapters alone, for peft, of a run with model.lora (default: weights that they are added to).",
    )
    made.add_argument("--push_to_hub", metavar="NAME", help="Also upload it to NAME on the hub, private if it is new.")
    return made


def sample_parser() -> CommandLine:
    """Parser of `popo sample`."""
    made = CommandLine("sample", "Asks a trained policy a question, as its run asked, and prints the answers.")
    made.add_argument("source", metavar=SOURCE, help="A run's folder, whose newest checkpoint counts, or a checkpoint.")
    made.add_argument("prompt", metavar="PROMPT", help="The question; - reads it from the standard input.")
    made.add_argument("--n", type=number(int, 1), default=4, help="Answers (default: 4).")
    made.add_argument(
        "--temperature", type=number(float, 0), default=1.0, help="Of sampling; 0 is the likeliest answer (default: 1)."
    )
    made.add_argument(
        "--max_new_tokens",
        type=number(int, 1),
        metavar="TOKENS",
        help="Longest answer in tokens (default: the run's data.max_new_tokens).",
    )
    made.add_argument("--image", action="append", default=[], metavar="FILE", help="Of the question; may be repeated.")
    made.add_argument("--gold", metavar="ANSWER", help="The right answer: the run's verifier then grades each answer.")
    made.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="What samples (default: transformers).",
    )
    made.add_argument("--seed", type=number(int, 0), default=1, help="Of the draws (default: 1).")
    add_policy_options(made)
    return made


def add_policy_options(made: CommandLine) -> None:
    """Adds the options that choose a run's checkpoint and find the model that it began with."""
    made.add_argument(
        "--best",
        action="store_true",
        help="Of the checkpoints that a run has kept, the best by checkpoint.monitor, or else by its evaluations.",
    )
    made.add_argument(
        "--base",
        metavar="FOLDER_OR_HUB_ID",
        help="Where the model that the run began with now is, if it is no longer where the run found it.",
    )


MAX = 10**9  # of answers, tokens, draws: more would never end


def number(kind: type[int] | type[float], least: float, above: bool = False) -> Callable[[str], float]:
    """Returns a function that reads a number of an option, at most a billion.

    Args:
        kind: Whether the number is whole.
        least: Smallest number allowed.
        above: Whether only numbers above `least` are allowed.
    """

    def read(text: str) -> float:
        try:
            found = kind(text) if len(text) < 40 and "_" not in text else math.nan
        except ValueError:
            found = math.nan
        if not found <= MAX or found < least or (above and found == least):
            named = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(
                f"'{text}' is no {named} {'above' if above else 'from'} {least:g}{'' if above else ' on'}; use one"
            )
        return found

    return read
