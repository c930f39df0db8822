"""Weighted sampling without replacement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random


def draw(log_weights: Sequence[float], count: int, random: Random) -> list[int]:
    """Places drawn one after the other in proportion to their weights, none twice.

    Each place gets an exponential clock of its weight as rate; the first to ring are those that drawing one by one
    would give (Efraimidis and Spirakis 2006).

    Args:
        log_weights: Logarithms of the weights, which need not add up to 1.
        count: Places wanted; all, if there are fewer.
        random: One draw a place.
    """
    rings = [math.log(max(random.expovariate(1.0), 1e-300)) - log_weight for log_weight in log_weights]
    return sorted(range(len(rings)), key=rings.__getitem__)[:count]
