"""Throughput metrics (tokens per second, model FLOPs utilization, memory), and the peak of known GPUs."""

from __future__ import annotations

import logging
import re
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from popo_lightning.core.bounds import above
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.peak_memory import take_peak_bytes
from popo_lightning.model.policy_checkpoint import FROZEN, SHAPES
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.training.model_flops import ModelFlops, row_lengths

# Dense bfloat16 TFLOP/s of the tensor cores with float32 accumulation, by the name from torch.cuda.get_device_name.
# NVIDIA's data sheets give those of data center cards (the larger number there is with sparsity, twice as much), its
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """The hardware of a rank.

    Args:
        device: Its device.
        flops: Floating-point operations of the model; None if unknown.
        peak: Peak TFLOP/s of the device; None if unknown or not needed.
        take_bytes: Takes the peak memory of a GPU in bytes.
    """

    device: torch.device
    flops: ModelFlops | None
    peak: float | None
    take_bytes: Callable[[torch.device], int] = take_peak_bytes

    @classmethod
    def of_policy(
        cls, policy: PolicyModel, peak: float | None, take_bytes: Callable[[torch.device], int] = take_peak_bytes
    ) -> Worker:
        """Describes this rank.

        Args:
            policy: Policy with its model loaded.
            peak: Value of monitor.peak_tflops.
            take_bytes: Takes the peak memory of a GPU in bytes; the engine's, which knows what sleeps.
        """
        card = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else None
        if peak is None and card is not None:
            peak = peak_tflops(card)
            if peak is None and policy.trainer.is_global_zero:
                log.warning("no throughput/mfu: the peak of a %s is not known here; set monitor.peak_tflops", card)
        shapes = {name: shape for name, shape in policy.described[SHAPES].items() if name.startswith("model.")}
        flops = ModelFlops.of_model(policy.model.config, shapes, {*policy.described.get(FROZEN, ())})
        if flops is None and peak is not None and policy.trainer.is_global_zero:
            log.warning("no throughput/mfu: nothing is known of the layers of a %s", policy.model.config.model_type)
        return cls(policy.device, flops, None if flops is None else peak, take_bytes)

    def work(self, minibatch: Minibatch) -> dict[str, float]:
        """Returns the work of a training step on this rank's minibatch. Steps and ranks are summed."""
        flops = 0.0 if self.flops is None else self.flops.of_minibatch(minibatch)
        return {"row_tokens": float(sum(row_lengths(minibatch))), "flops": flops}

    def state(self) -> dict[str, float | None]:
        """Returns peak memory and peak TFLOP/s, once per iteration, to share with all ranks."""
        return {"peak_gib": take_peak_memory(self.device, self.take_bytes), "peak_tflops": self.peak}


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


def check_peak(peak: float | None) -> float | None:
    """Returns the peak, or raises SettingError if it is not a positive finite number."""
    example = "989.4, the card's dense bfloat16 peak in TFLOP/s, or null to look it up by the card's name"
    return None if peak is None else above("monitor.peak_tflops", peak, 0, example)


def throughput_metrics(steps: Sequence[dict[str, float]], ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns metrics of an iteration, by the names of docs/metrics.md.

    `throughput/train_tokens_per_second` is the number of prompt and response tokens in the rows of all optimizer steps
    and ranks, divided by the seconds of the training steps: forward, backward and update, without generation and the
    proximal log-probs. A row counts in each step it is in, always with its prompt, even if several responses share one
    pass over it; padding does not count. (NeMo-RL's "policy training" and prime-rl's throughput are the same; verl's
    perf/throughput divides by the seconds of the whole iteration and by the number of cards.)

    `throughput/mfu` is the operations of the forward and backward passes on these rows, as :class:`ModelFlops` counts
    them, divided by the bfloat16 peak of all ranks' cards in the same seconds. It is absent if a card's peak is neither
    known nor given.

    `memory/peak_gib` is the largest peak of any rank since the previous iteration, by :func:`take_peak_memory`.

    Args:
        steps: row_tokens, flops and train_seconds of each step, over all ranks.
        ranks: :meth:`Worker.state` of each rank.
    """
    metrics = {"memory/peak_gib": max(rank["peak_gib"] for rank in ranks)}
    tokens, flops, seconds = (sum(step[name] for step in steps) for name in ("row_tokens", "flops", "train_seconds"))
    if not tokens or seconds <= 0:
        return metrics
    metrics["throughput/train_tokens_per_second"] = tokens / seconds
    peaks = [rank["peak_tflops"] for rank in ranks]
    if None not in peaks:
        metrics["throughput/mfu"] = flops / (seconds * sum(peaks) * 1e12)
    return metrics
