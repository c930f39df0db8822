"""Sums over an iteration's response tokens, computed on the device, and the metrics derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from popo_lightning.metrics.weight_sample import WeightSample, quantiles
from popo_lightning.model.padded_rows import PaddedRows
from popo_lightning.objectives.objective import TokenStatistics

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
MAXIMA = ("ratio", "weight_raw", "gap")
SUMS = (*MAXIMA, "clipped", "capped", "entropy", "gaps", "weight_raw_squared")


@dataclass
class AgeSums:
    """Sums over the tokens of one or several ages.

    Args:
        tokens: Number of tokens.
        sums: (8,) float64, named by SUMS. gap is an absolute value; gaps counts the tokens that have one.
        maxima: (3,) float64, named by MAXIMA.
    """

    tokens: int
    sums: Tensor
    maxima: Tensor

    def sum(self, name: str) -> float:
        """Returns the sum over all tokens."""
        return float(self.sums[SUMS.index(name)])

    def mean(self, name: str) -> float:
        """Returns the mean over all tokens."""
        return self.sum(name) / self.tokens

    def max(self, name: str) -> float:
        """Returns the maximum over all tokens."""
        return float(self.maxima[MAXIMA.index(name)])

    @property
    def effective_sample_size(self) -> float:
        """Effective sample size of the raw weights as a fraction of N: (sum w)^2 / (N sum w^2), in (0, 1]."""
        total, squares = (self.sums[SUMS.index(name)] for name in ("weight_raw", "weight_raw_squared"))
        return float(total.square() / (self.tokens * squares))


class TokenSums:
    """Statistics of response tokens: micro-batches are added, minibatches merged.

    Nothing here waits for the device before :meth:`to_plain`. The size does not depend on the number of tokens, except
    for the two bounded samples of raw weights. Rows of age 0 are the fresh ones.

    Attributes:
        ages: Sums by age in policy versions.
        fresh_weights: Sample of the raw weights of fresh rows.
        replayed_weights: Sample of the raw weights of all other rows.
    """

    def __init__(self) -> None:
        self.ages: dict[int, AgeSums] = {}
        self.fresh_weights = WeightSample()
        self.replayed_weights = WeightSample()

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(of_age.tokens for of_age in self.ages.values())

    @property
    def entropy(self) -> float:
        """Sum of the tokens' entropies in nats. Waits for the device."""
        return sum(of_age.sum("entropy") for of_age in self.ages.values())

    def add(self, part: PaddedRows, found: TokenStatistics, entropy: Tensor, gap: Tensor | None) -> None:
        """Adds the tokens of a micro-batch.

        Args:
            part: Rows of the micro-batch on the CPU, where counting does not occupy the device.
            found: The objective's statistics, (R, T) each.
            entropy: (R, T) entropies, detached.
            gap: (R, T) log-prob of the policy minus that of the engine, NaN where unknown. None: unknown everywhere.
        """
        if not part.mask.any():
            return
        mask = part.mask.to(entropy.device, non_blocking=True)
        sums, maxima = _by_row(mask, found, entropy, gap)
        ages = part.age.unique().tolist()
        for age in ages:
            rows = part.age == age
            if tokens := int(part.mask[rows].sum()):
                of_age, largest = sums, maxima
                if len(ages) > 1:  # rows of one age, the usual case, need no selection on the device
                    here = rows.to(entropy.device, non_blocking=True)
                    of_age, largest = torch.where(here, sums, 0.0), torch.where(here, maxima, -torch.inf)
                self._join(age, AgeSums(tokens, of_age.sum(-1), largest.amax(-1)))
        self.fresh_weights.add(found.weight_raw, _places(part.mask, part.age == 0))
        self.replayed_weights.add(found.weight_raw, _places(part.mask, part.age != 0))

    def merge(self, other: TokenSums) -> None:
        """Adds the tokens of another object."""
        for age, found in other.ages.items():
            self._join(age, found)
        self.fresh_weights.merge(other.fresh_weights)
        self.replayed_weights.merge(other.replayed_weights)

    def _join(self, age: int, found: AgeSums) -> None:
        if (own := self.ages.get(age)) is not None:
            found = _together((own, found))
        self.ages[age] = found

    def to_plain(self) -> dict[str, Any]:
        """Returns plain numbers and CPU tensors, for the checkpoint and for other ranks."""
        sums = {a: {"tokens": f.tokens, "sums": f.sums.cpu(), "maxima": f.maxima.cpu()} for a, f in self.ages.items()}
        return {
            "ages": sums,
            "fresh_weights": self.fresh_weights.to_plain(),
            "replayed_weights": self.replayed_weights.to_plain(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TokenSums:
        """Inverse of :meth:`to_plain`."""
        found = cls()
        found.ages = {age: AgeSums(**of_age) for age, of_age in plain["ages"].items()}
        found.fresh_weights = WeightSample.from_plain(plain["fresh_weights"])
        found.replayed_weights = WeightSample.from_plain(plain["replayed_weights"])
        return found


def token_metrics(ranks: Sequence[TokenSums]) -> dict[str, float]:
    """Returns metrics of an iteration's response tokens, by the names of docs/metrics.md; none without tokens.

    Means, maxima, shares and effective sample sizes are exact over all tokens. Quantiles are exact while each rank's
    fresh or replayed weights fit into its :class:`WeightSample`; for more tokens they are estimates with the error that
    the class states.

    Args:
        ranks: Sums of each rank, on the CPU.
    """
    found: dict[int, AgeSums] = {}
    for age in sorted({age for rank in ranks for age in rank.ages}):
        found[age] = _together(rank.ages[age] for rank in ranks if age in rank.ages)
    if not found:
        return {}
    of_all = _together(found.values())
    metrics = {
        "policy/entropy": of_all.mean("entropy"),
        "policy/ratio_mean": of_all.mean("ratio"),
        "policy/ratio_max": of_all.max("ratio"),
        "policy/clip_frac": of_all.mean("clipped"),
        "train/tokens": float(of_all.tokens),
    }
    fresh, replayed = found.get(0), {age: sums for age, sums in found.items() if age}
    if fresh is not None:
        metrics |= _weight_metrics("fresh", fresh, [rank.fresh_weights for rank in ranks])
    if replayed:
        together = _together(replayed.values())
        metrics |= _weight_metrics("replayed", together, [rank.replayed_weights for rank in ranks])
        metrics["weight/replayed_capped_share"] = together.mean("capped")
        metrics |= {f"weight/ess_age_{age}": sums.effective_sample_size for age, sums in replayed.items()}
    metrics |= {f"weight/share_age_{age}": sums.tokens / of_all.tokens for age, sums in found.items()}
    if fresh is not None and (gaps := fresh.sum("gaps")):
        metrics["engine/logp_gap_mean"] = fresh.sum("gap") / gaps
        metrics["engine/logp_gap_max"] = fresh.max("gap")
    return metrics


def _weight_metrics(name: str, tokens: AgeSums, samples: Sequence[WeightSample]) -> dict[str, float]:
    of_sample = zip(QUANTILES, quantiles(samples, list(QUANTILES.values())), strict=True)
    return {
        f"policy/clip_frac_{name}": tokens.mean("clipped"),
        f"weight/{name}_mean": tokens.mean("weight_raw"),
        f"weight/{name}_max": tokens.max("weight_raw"),
        f"weight/{name}_ess": tokens.effective_sample_size,
    } | {f"weight/{name}_{label}": value for label, value in of_sample}


def _together(parts: Iterable[AgeSums]) -> AgeSums:
    first, *others = parts
    tokens, sums, maxima = first.tokens, first.sums, first.maxima
    for other in others:
        tokens += other.tokens
        sums = sums.to(other.sums.device) + other.sums
        maxima = torch.maximum(maxima.to(other.maxima.device), other.maxima)
    return AgeSums(tokens, sums, maxima)


def _by_row(mask: Tensor, found: TokenStatistics, entropy: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (8, R) sums and (3, R) maxima over each row's tokens, -inf without any. Padding may hold any value."""
    ratio, raw, capped = found.ratio, found.weight_raw, found.weight < found.weight_raw
    known = torch.zeros_like(mask) if gap is None else ~gap.isnan()
    distance = torch.zeros_like(raw) if gap is None else torch.where(known, gap.abs(), 0.0)
    columns = torch.where(mask, torch.stack([ratio, raw, distance, found.clipped, capped, entropy, known]), 0.0)
    squares = columns[1].double().square().sum(-1)
    sums = torch.cat((columns.sum(-1, dtype=torch.float64), squares[None]))
    return sums, torch.where(mask, columns[: len(MAXIMA)], -torch.inf).amax(-1).double()


def _places(mask: Tensor, rows: Tensor) -> Tensor:
    """Returns (N,) flat indices into (R, T) of some rows' tokens."""
    return (mask & rows[:, None]).flatten().nonzero().squeeze(-1)
