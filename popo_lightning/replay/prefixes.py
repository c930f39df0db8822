"""Prefixes of stored responses."""

from __future__ import annotations

from random import Random

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response


def cut_response(response: Response, shares: tuple[float, float], random: Random) -> Tensor:
    """Returns the beginning of a response, a random fraction of its tokens between two bounds.

    It has at least one token if the response has two, and never all of them. So it contains no end token, and a
    continuation may write at least one token, because no response exceeds the limit.
    """
    tokens = len(response.token_ids)
    length = max(1, int(random.uniform(*shares) * tokens))
    return response.token_ids[: min(length, tokens - 1)].clone()  # a slice would keep, and save, the whole response


def checked_shares(rule: str, shares: tuple[float, float]) -> tuple[float, float]:
    """Returns the two fractions, or raises SettingError if they are not rising in [0, 1]."""
    low, high = shares
    if not 0 <= low <= high <= 1:
        raise SettingError(f"{rule}.cut is {list(shares)}; give two rising shares of a response, such as [0.25, 0.75]")
    return low, high
