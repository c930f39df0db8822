"""The subcommand `popo sample`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popo_lightning.core.groups import Response

MAX_CHARACTERS = 1_000_000  # of a prompt on the standard input


def main(args: Sequence[str]) -> int:
    """Runs the subcommand, and returns the exit code 0."""
    from popo_lightning.cli.export.options import sample_parser

    asked = sample_parser().parse_args(args)  # answers --help before torch is imported
    from popo_lightning.cli.export.asked_policy import Question, answers
    from popo_lightning.cli.export.saved_policy import saved_policy
    from popo_lightning.cli.parser import refuse
    from popo_lightning.cli.quiet_libraries import quieten
    from popo_lightning.core.errors import SettingError

    quieten()
    try:
        text = sys.stdin.read(MAX_CHARACTERS).removesuffix("\n") if asked.prompt == "-" else asked.prompt
        if not text.strip():
            raise SettingError("PROMPT is empty; ask something")
        draws = (asked.n, asked.temperature, asked.max_new_tokens, asked.seed)
        question = Question(text, asked.image, asked.gold, *draws)
        found = answers(saved_policy(asked.source, asked.best), question, asked.engine, asked.base)
    except SettingError as error:
        refuse(str(error))
    output: Any = sys.stdout
    if hasattr(output, "reconfigure"):
        output.reconfigure(errors="backslashreplace")  # for a terminal that lacks some characters
    for line in lines(found, graded=asked.gold is not None):
        print(line)
    return 0


def lines(found: Sequence[Response], graded: bool) -> Iterator[str]:
    """Lines for answers: a heading, the answer and an empty line each.

    Args:
        found: Answers.
        graded: Whether the answers were graded against a right one.
    """
    from popo_lightning.cli.export.visible_text import visible

    for number, response in enumerate(found, 1):
        grades = [f"{visible(part)} {value:g}" for part, value in response.parts.items()] if graded else []
        if graded and response.failure is not None:
            grades.append(f"the verifier failed ({response.failure})")
        end = "cut at its limit" if response.finish_reason == "length" else "ended by itself"
        said = [f"{len(response.token_ids)} tokens", end]
        yield f"-- answer {number} of {len(found)}: {', '.join([*grades, *said])}"
        yield visible(response.text)
        yield ""
