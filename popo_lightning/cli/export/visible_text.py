"""Makes a policy's text safe for a terminal: spells out what would move the cursor or reverse text."""

from __future__ import annotations

import unicodedata

LAYOUT = "\n\t"
# controls, formats such as those that reverse text, surrogates, private and unassigned characters
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(text: str) -> str:
    r"""Spells out hidden characters, such as ``\x1b`` for an escape; newlines and tabs stay.

    Args:
        text: Any text of a policy.
    """
    return "".join(
        each if each in LAYOUT or unicodedata.category(each) not in HIDDEN else each.encode("unicode_escape").decode()
        for each in text
    )
