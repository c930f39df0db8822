"""Text with fields to fill from a row. It is not str.format: LaTeX braces, in the text and in a row, stay unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable

# The first alternative matches whole LaTeX commands, so that \frac{a}{b} and x_{n} have no places a, b or n.
PLACE = re.compile(r"(?:\\[A-Za-z]+(?:\{[^{}]*\})+|[_^]\{[^{}]*\})|\{([A-Za-z_]\w*(?:\.\w+)*)\}", re.ASCII)


NEXT_QUESTION = ("\nQuestion:", "\nProblem:", "\nQ:")


class Template:
    r"""Text in which ``{name}`` stands for a column of the row.

    Args:
        text: The text. ``\boxed{name}`` is LaTeX and stays; ``\boxed{{name}}`` boxes the column.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names = list(dict.fromkeys(match[1] for match in PLACE.finditer(text) if match[1]))

    def fill(self, value: Callable[[str], str]) -> str:
        """Fills each place with its value. Values are not searched for places."""
        return PLACE.sub(lambda match: value(match[1]) if match[1] else match[0], self.text)

    def next_question(self) -> tuple[str, ...]:
        """Returns strings with which a base model begins another question: the usual ones, and this text's own label.

        The label is the text before the first place on its line, if it ends in a colon.
        """
        first = next((place for place in PLACE.finditer(self.text) if place[1]), None)
        label = self.text[: first.start()].rpartition("\n")[2].strip() if first else ""
        own = f"\n{label}"
        return NEXT_QUESTION if own in NEXT_QUESTION or not label.endswith(":") else (*NEXT_QUESTION, own)
