"""Peak memory that torch has allocated on a GPU."""

from __future__ import annotations

import torch


def take_peak_bytes(device: torch.device) -> int:
    """Returns the peak in bytes on the rank's GPU since the last call."""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
