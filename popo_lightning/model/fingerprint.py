"""Fingerprints of weights: equal for equal bits, and almost surely different for different bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 2**22  # number of elements that are widened to 8 bytes at a time
PART = 2**16  # number of elements per weight in a partial fingerprint
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer types by size in bytes


@torch.no_grad()
def sums_of(tensor: Tensor) -> Tensor:
    """Sums a tensor's bits as integers, plain and times their positions, modulo 2^64.

    Integer sums do not depend on the order, so threads and devices do not matter. Nothing waits for the device.

    Args:
        tensor: Tensor of any shape and dtype.

    Returns:
        (2,) int64 sums on the tensor's device.
    """
    bits = tensor.detach().reshape(-1)
    bits = bits.view(BITS[bits.element_size()])
    found = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    places = torch.arange(1, min(CHUNK, max(1, len(bits))) + 1, device=tensor.device)
    for begin in range(0, len(bits), CHUNK):
        part = bits[begin : begin + CHUNK].to(torch.int64)
        plain = part.sum()
        found += torch.stack((plain, part.mul_(places[: len(part)]).sum() + plain * begin))
    return found


class Fingerprint:
    """Fingerprint of weights that are added one at a time and not kept.

    Args:
        whole: true takes all of each weight; false takes its first 65,536 elements, which costs almost no time.
    """

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, name: str, weight: Tensor) -> None:
        """Adds a weight.

        Args:
            name: Name of the weight.
            weight: Values of the weight.
        """
        self._names.append(f"{name} {tuple(weight.shape)} {weight.dtype}")
        self._sums.append(sums_of(weight if self.whole else weight.detach().reshape(-1)[:PART]))

    def of_each(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights unchanged, and adds each to the fingerprint.

        Args:
            weights: Weights by name.
        """
        for name, weight in weights:
            self.add(name, weight)
            yield name, weight

    def hexdigest(self) -> str:
        """Returns the fingerprint as 16 hexadecimal digits."""
        sums = [each.tolist() for each in self._sums]
        text = "\n".join(f"{name} {plain} {placed}" for name, (plain, placed) in zip(self._names, sums, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(weights: Iterable[tuple[str, Tensor]], whole: bool = True) -> str:
    """Returns a fingerprint of names, shapes, dtypes and bits as 16 hexadecimal digits.

    Args:
        weights: Weights by name, always in the same order.
        whole: Whether all of each weight counts, see :class:`Fingerprint`.
    """
    made = Fingerprint(whole)
    for name, weight in weights:
        made.add(name, weight)
    return made.hexdigest()
