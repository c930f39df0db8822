"""Peak memory that torch has allocated on a GPU."""

from __future__ import annotations

import torch


def take_peak_bytes(device: torch.device) -> int:
    """Returns the peak in bytes since the last call.

    Args:
        device: The rank's GPU.
    """
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
