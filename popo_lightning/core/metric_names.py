"""Names that users and verifiers give to parts of a metric's name, such as reward/NAME."""

from __future__ import annotations

import re

PART = re.compile(r"[\w-]+")
RULE = "letters, digits, - and _ alone"


def is_part(name: str) -> bool:
    """Returns whether a metric can have this part: no reader of metrics.csv takes it for two names or two columns."""
    return PART.fullmatch(name) is not None
