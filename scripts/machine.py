"""Names the machine that a measurement was taken on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, GPU, threads and versions.

    Args:
        packages: Further distributions whose versions matter here; those that are not installed are left out.
    """
    import torch

    processor = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+) kB", _text("/proc/meminfo"))
    return {
        "processor": processor[1] if processor else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions("torch", *packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions by distribution, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def available_bytes() -> int:
    """Main memory available without swapping; -1 if the system does not report it."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    return int(found[1]) * 1024 if found else -1


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
