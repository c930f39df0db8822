"""Prefixes of stored responses."""

from __future__ import annotations

from random import Random

from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response


def cut_response(response: Response, shares: tuple[float, float], random: Random) -> Tensor:
    """The beginning of a response: a share of its tokens drawn between two, at least one token if it has two.

    Never all of them. So an end token is not among them, and what goes on from here may write one token at least,
    since no response is longer than the limit.
    """
    tokens = len(response.token_ids)
    length = max(1, int(random.uniform(*shares) * tokens))
    return response.token_ids[: min(length, tokens - 1)].clone()  # a slice would keep, and save, the whole response


def checked_shares(rule: str, shares: tuple[float, float]) -> tuple[float, float]:
    """Shares as they are, or SettingError for a pair that is none."""
    low, high = shares
    if not 0 <= low <= high <= 1:
        raise SettingError(f"{rule}.cut is {list(shares)}; give two rising shares of a response, such as [0.25, 0.75]")
    return low, high
