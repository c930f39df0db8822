"""Peak performance of known GPUs, and the peak memory used."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable

import torch

from popo_lightning.core.peak_memory import take_peak_bytes

# Dense bfloat16 TFLOP/s of the tensor cores with float32 accumulation, by the name from torch.cuda.get_device_name.
# NVIDIA's data sheets give those of data centre cards (the larger number there is with sparsity, twice as much), its
# architecture white papers (GA102, Ada, RTX Blackwell) those of GeForce and RTX cards. Lightning's own table has the
# rates with sparsity for some cards, and those outside the tensor cores for others.
PEAK_TFLOPS = {
    r"B200|HGX B200": 2250.0,
    r"GB200": 2500.0,
    r"H200 NVL": 835.5,
    r"H200|GH200.*": 989.4,
    r"H100 NVL": 835.5,
    r"H100 PCIe": 756.5,
    r"H100 (\d+GB HBM3|SXM.*)|H800.*": 989.4,
    r"H20": 148.0,
    r"A100.*|A800.*": 312.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"A10": 125.0,
    r"L40S": 362.0,
    r"L40": 181.0,
    r"L4": 121.0,
    r"RTX A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.2,
    r"RTX 3090": 71.0,
    r"RTX 3090 Ti": 80.0,
    r"RTX 4080": 97.5,
    r"RTX 4090": 165.2,
    r"RTX 5080": 112.6,
    r"RTX 5090": 209.5,
}
GIB = 2**30


def card_name(device: torch.device) -> str | None:
    """Returns the name of a rank's card; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def peak_tflops(card: str) -> float | None:
    """Returns a card's dense bfloat16 TFLOP/s by its name, as NVIDIA states them; None if the table lacks the card.

    A slice of a card (MIG) or a laptop's card of the same name is a different card.
    """
    name = re.sub(r"^NVIDIA (GeForce )?", "", card)
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)


def take_peak_memory(device: torch.device, take_bytes: Callable[[torch.device], int] = take_peak_bytes) -> float:
    """Returns the peak memory in GiB.

    On CUDA it is the memory allocated by torch since the last call, including an engine's in this process while that is
    awake. On a CPU it is the process's resident memory, whose peak the system measures only since the process began.

    Args:
        device: Device of the rank.
        take_bytes: Takes the peak of a GPU in bytes, as the engine does.
    """
    if device.type == "cuda":
        return take_bytes(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux
