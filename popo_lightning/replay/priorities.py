"""Weighted sampling without replacement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random


def draw(log_weights: Sequence[float], count: int, random: Random) -> list[int]:
    """Draws distinct indices one after the other, in proportion to their weights.

    Each index gets an exponential clock with its weight as rate. The order of ringing has the distribution of
    drawing one by one (Efraimidis and Spirakis 2006).

    Args:
        log_weights: Logarithms of the weights, which need not sum to 1.
        count: Number of indices wanted. All are drawn if there are fewer.
        random: Generator, used once per index.
    """
    rings = [math.log(max(random.expovariate(1.0), 1e-300)) - log_weight for log_weight in log_weights]
    return sorted(range(len(rings)), key=rings.__getitem__)[:count]
