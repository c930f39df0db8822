"""Text of a policy as a terminal may be given it: what would move its cursor or turn its text round is spelled out."""

from __future__ import annotations

import unicodedata

LAYOUT = "\n\t"
# controls, formats such as those that reverse the direction of text, halves of characters, private and unknown ones
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(text: str) -> str:
    r"""The text with ``\x1b`` for an escape and the like; line ends and tabs stay as they are.

    Args:
        text: Whatever a policy has written.
    """
    return "".join(
        character if character in LAYOUT or unicodedata.category(character) not in HIDDEN else _spelled(character)
        for character in text
    )


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
