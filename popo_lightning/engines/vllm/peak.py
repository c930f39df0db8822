"""Peak memory of a GPU on which vLLM sleeps while the policy trains.

vLLM's sleep releases memory under torch's allocator, which keeps counting it (vllm/device_allocator/cumem.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from popo_lightning.core.peak_memory import take_peak_bytes


def asleep_bytes() -> int:
    """Bytes that torch counts as allocated though vLLM has released them."""
    from vllm.device_allocator import get_mem_allocator_instance

    allocations = get_mem_allocator_instance().pointer_to_data
    asleep = {pointer for pointer, data in allocations.items() if data.is_asleep}
    # vLLM knows whole segments; torch counts only what is used of each
    segments = torch.cuda.memory_snapshot()
    return sum(segment["allocated_size"] for segment in segments if segment["address"] in asleep)


class PeakBesideSleep:
    """The largest peak over the times in which vLLM is awake, asleep or half awake."""

    def __init__(self) -> None:
        self._peak = 0
        self._asleep = 0

    @contextmanager
    def changes(self, device: torch.device) -> Iterator[None]:
        """Ends one such time and begins the next.

        Args:
            device: The rank's GPU.
        """
        self._note(device)
        yield
        self._asleep = asleep_bytes()

    def take(self, device: torch.device) -> int:
        """Returns the peak in bytes since the last call.

        Args:
            device: The rank's GPU.
        """
        self._note(device)
        peak, self._peak = self._peak, 0
        return peak

    def _note(self, device: torch.device) -> None:
        self._peak = max(self._peak, take_peak_bytes(device) - self._asleep)
