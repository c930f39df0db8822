"""Sums over response tokens give the same metrics as all tokens at once, without waiting for the device."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.groups import group
from torch import Tensor

from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Minibatch, Row
from popo_lightning.metrics import weight_sample
from popo_lightning.metrics.estimates import effective_sample_size
from popo_lightning.metrics.weight_sample import WeightSample, quantiles
from popo_lightning.model.padded_rows import PaddedRows, PassOutputs, pad_rows
from popo_lightning.objectives.objective import Objective, TokenStatistics
from popo_lightning.training.minibatch_loss import MinibatchLoss
from popo_lightning.training.token_sums import TokenSums, token_metrics

NAMES = ("ratio", "clipped", "weight_raw", "weight", "entropy", "gap")


def padded(lengths: list[int], ages: list[int]) -> PaddedRows:
    rows = [
        Row(i, torch.tensor([1]), Response(torch.ones(n).long(), torch.zeros(n), "stop"), age=age)
        for i, (n, age) in enumerate(zip(lengths, ages, strict=True))
    ]
    return pad_rows(rows)


def added(sums: TokenSums, part: PaddedRows, columns: dict[str, Tensor], gap: bool = True) -> TokenSums:
    found = TokenStatistics(*(columns[name] for name in NAMES[:4]), columns["entropy"])
    sums.add(part, found, columns["entropy"], columns["gap"] if gap else None)
    return sums


def of_tokens(ages: list[int], **values: list[float]) -> TokenSums:
    """Makes each token a row."""
    columns = {name: torch.tensor(column)[:, None] for name, column in values.items()}
    return added(TokenSums(), padded([1] * len(ages), ages), columns)


def drawn(draw: torch.Generator, lengths: list[int], ages: list[int]) -> tuple[PaddedRows, dict[str, Tensor]]:
    """Returns a micro-batch with nan in its padding."""
    part = padded(lengths, ages)
    shape = part.mask.shape
    raw = torch.randn(shape, generator=draw).mul(2).exp()
    gap = torch.randn(shape, generator=draw)
    columns = {
        "ratio": torch.randn(shape, generator=draw),  # some regions bound a number that may be negative
        "weight_raw": raw,
        "weight": raw.clamp(max=3),
        "entropy": torch.rand(shape, generator=draw),
        "gap": gap.where(gap > -1, torch.nan),  # some tokens have no known gap
    }
    columns = {name: column.where(part.mask, torch.nan) for name, column in columns.items()}
    return part, columns | {"clipped": torch.rand(shape, generator=draw) < 0.3}


def at_once(parts: list[tuple[PaddedRows, dict[str, Tensor]]]) -> dict[str, float]:
    """Computes the same metrics by definition from flat columns of all tokens."""
    tokens = {name: torch.cat([columns[name][part.mask].double() for part, columns in parts]) for name in NAMES}
    age = torch.cat([part.age[:, None].expand_as(part.mask)[part.mask] for part, _ in parts])
    fresh = age == 0
    found = {
        "policy/entropy": float(tokens["entropy"].mean()),
        "policy/ratio_mean": float(tokens["ratio"].mean()),
        "policy/ratio_max": float(tokens["ratio"].max()),
        "policy/clip_frac": float(tokens["clipped"].mean()),
        "train/tokens": float(len(age)),
    }
    for name, rows in (("fresh", fresh), ("replayed", ~fresh)):
        if rows.any():
            raw = tokens["weight_raw"][rows]
            found[f"policy/clip_frac_{name}"] = float(tokens["clipped"][rows].mean())
            found |= {f"weight/{name}_mean": float(raw.mean()), f"weight/{name}_max": float(raw.max())}
            found |= {f"weight/{name}_p{p:02}": float(raw.quantile(p / 100)) for p in (5, 50, 95, 99)}
            found[f"weight/{name}_ess"] = effective_sample_size(raw)
    if (~fresh).any():
        capped = tokens["weight"] < tokens["weight_raw"]
        found["weight/replayed_capped_share"] = float(capped[~fresh].double().mean())
    for each in age[~fresh].unique().tolist():
        found[f"weight/ess_age_{each}"] = effective_sample_size(tokens["weight_raw"][age == each])
    for each in age.unique().tolist():
        found[f"weight/share_age_{each}"] = float((age == each).double().mean())
    gap = tokens["gap"][fresh].abs()
    if len(gap := gap[~gap.isnan()]):
        found |= {"engine/logp_gap_mean": float(gap.mean()), "engine/logp_gap_max": float(gap.max())}
    return found


def test_by_hand() -> None:
    found = of_tokens(
        ages=[0, 0, 1, 1, 3, 3],
        ratio=[1.0, 1.2, 0.8, 1.0, 2.0, 0.6],
        clipped=[True, False, False, False, True, False],
        weight_raw=[1.0, 3.0, 1.0, 1.0, 2.0, 8.0],
        weight=[1.0, 1.0, 1.0, 1.0, 2.0, 5.0],
        entropy=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        gap=[0.1, -0.3, 9.0, 9.0, 9.0, 9.0],
    )
    expected = {
        "policy/entropy": 2.5,
        "policy/ratio_mean": 1.1,
        "policy/ratio_max": 2.0,
        "policy/clip_frac": 2 / 6,
        "policy/clip_frac_fresh": 1 / 2,
        "policy/clip_frac_replayed": 1 / 4,
        "train/tokens": 6.0,
        # Raw weights: on fresh rows they are not 1, and above the cap they are not capped.
        "weight/fresh_mean": 2.0,
        "weight/fresh_max": 3.0,
        "weight/fresh_p05": 1.1,
        "weight/fresh_p50": 2.0,
        "weight/fresh_p95": 2.9,
        "weight/fresh_p99": 2.98,
        "weight/fresh_ess": 16 / 20,
        "weight/replayed_mean": 3.0,
        "weight/replayed_max": 8.0,
        "weight/replayed_p05": 1.0,
        "weight/replayed_p50": 1.5,
        "weight/replayed_p95": 2 + 6 * 0.85,
        "weight/replayed_p99": 2 + 6 * 0.97,
        "weight/replayed_ess": 12**2 / (4 * 70),
        "weight/replayed_capped_share": 1 / 4,
        "weight/ess_age_1": 1.0,
        "weight/ess_age_3": 100 / (2 * 68),
        "weight/share_age_0": 1 / 3,
        "weight/share_age_1": 1 / 3,
        "weight/share_age_3": 1 / 3,
        "engine/logp_gap_mean": 0.2,
        "engine/logp_gap_max": 0.3,
    }
    assert token_metrics([found]) == pytest.approx(expected, rel=1e-6)
    assert (found.count, found.entropy) == (6, 15.0)


@pytest.mark.parametrize(
    ("ages", "absent"),
    [([0, 0, 2], []), ([0, 0, 0], ["replayed", "ess_age"]), ([1, 7, 300], ["fresh", "gap"])],
    ids=["both", "fresh", "replayed"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_as_from_all_tokens_at_once(ages: list[int], absent: list[str], ranks: int) -> None:
    """Micro-batches, minibatches and ranks have unequal sizes, and some rows and a minibatch have no tokens."""
    draw = torch.Generator().manual_seed(1)
    everything, of_ranks = [], []
    for rank in range(ranks):
        iteration = TokenSums()
        for sizes in ([3, 1], [6], []):
            minibatch = TokenSums()
            for size in sizes:
                lengths = [*torch.randint(0, 9, (size,), generator=draw).tolist(), 4 + rank]
                part, columns = drawn(draw, lengths, (ages * size)[: size + 1])
                everything.append((part, columns))
                added(minibatch, part, columns)
            iteration.merge(minibatch)
        of_ranks.append(iteration)
    found = token_metrics(of_ranks)
    assert found == pytest.approx(at_once(everything), rel=1e-7)
    for word in ("fresh", "replayed", "gap", "ess_age"):
        assert any(word in name for name in found) == (word not in absent)
    assert token_metrics([*of_ranks, TokenSums()]) == found, "a rank without tokens"


def test_nothing_is_known_without_tokens_and_no_gap_after_the_first_step() -> None:
    assert token_metrics([TokenSums(), TokenSums()]) == {}
    part, columns = drawn(torch.Generator().manual_seed(1), [3, 2], [0, 1])
    assert not [name for name in token_metrics([added(TokenSums(), part, columns, gap=False)]) if "gap" in name]
    nothing = added(TokenSums(), *drawn(torch.Generator().manual_seed(1), [0, 0], [0, 1]))
    assert nothing.count == 0 and token_metrics([nothing]) == {}


def test_a_checkpoint_keeps_them_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(2)
    parts = [drawn(draw, [5, 2, 7], [0, 1, 4]) for _ in range(4)]
    whole, before = TokenSums(), TokenSums()
    for part, columns in parts:
        whole.merge(added(TokenSums(), part, columns))
    for part, columns in parts[:2]:
        before.merge(added(TokenSums(), part, columns))
    file = io.BytesIO()
    torch.save(before.to_plain(), file)
    resumed = TokenSums()
    resumed.merge(TokenSums.from_plain(torch.load(io.BytesIO(file.getvalue()), weights_only=True)))
    for part, columns in parts[2:]:
        resumed.merge(added(TokenSums(), part, columns))
    assert token_metrics([resumed]) == token_metrics([whole])


def test_size_does_not_depend_on_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sample, "LIMIT", 64)
    sizes = []
    for length in (50, 500):
        sums = TokenSums()
        for _ in range(5):
            added(sums, *drawn(torch.Generator().manual_seed(3), [length] * 4, [0, 1, 0, 2]))
        file = io.BytesIO()
        torch.save(sums.to_plain(), file)
        sizes.append(file.tell())
        assert sums.count == 20 * length
        assert all(32 <= len(s.values) <= 64 for s in (sums.fresh_weights, sums.replayed_weights))
    assert abs(sizes[0] - sizes[1]) < 64 * 4 * 2


# -- quantiles of a sample -----------------------------------------------------------------------------------------

SHARES = [0.0, 0.05, 0.5, 0.95, 0.99, 1.0]


def sample(values: Tensor, at_a_time: int = 1000) -> WeightSample:
    found = WeightSample()
    for part in values.split(at_a_time):
        found.add(part, torch.arange(len(part)))
    return found


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_of_complete_samples_are_those_of_all_values(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).exp()
    expected = values.quantile(torch.tensor(SHARES)).tolist()
    assert quantiles([sample(values)], SHARES) == pytest.approx(expected, rel=1e-5)
    unequal = [sample(part, 3) for part in (values[: count // 3], values[count // 3 :])]
    assert quantiles(unequal, SHARES) == pytest.approx(expected, rel=1e-5)
    assert all(math.isnan(value) for value in quantiles([sample(torch.tensor([1.0, torch.nan]))], SHARES))


def test_quantiles_of_many_values_are_near_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two ranks has nine times the other's tokens and larger weights. Each value counts the same."""
    monkeypatch.setattr(weight_sample, "LIMIT", 2**12)
    draw = torch.Generator().manual_seed(4)
    many, few = torch.randn(90_000, generator=draw).exp() + 1, torch.randn(10_000, generator=draw).exp()
    samples = [sample(many), sample(few)]
    assert [s.count for s in samples] == [90_000, 10_000] and all(2**11 <= len(s.values) <= 2**12 for s in samples)
    everything = torch.cat((many, few))
    for share, found in zip(SHARES[1:-1], quantiles(samples, SHARES[1:-1]), strict=True):
        bound = 4 * math.sqrt(share * (1 - share) / 2**12)  # four standard errors
        assert float((everything <= found).float().mean()) == pytest.approx(share, abs=bound)


def test_a_merged_sample_is_one_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sample, "LIMIT", 100)
    merged, later = sample(torch.arange(1000.0)), sample(torch.arange(1000.0, 1090.0))
    assert (merged.stride, later.stride) == (16, 1)
    merged.merge(later)
    assert (merged.count, merged.stride) == (1090, 16)
    assert merged.values.tolist() == [*range(0, 1000, 16), *range(1000, 1090, 16)]
    later.merge(sample(torch.arange(1000.0)))
    assert (later.count, later.stride) == (1090, 16) and later.values.tolist()[:6] == [
        1000,
        1016,
        1032,
        1048,
        1064,
        1080,
    ]


# -- no wait for the device ----------------------------------------------------------------------------------------


def two_micro_batches(device: torch.device) -> MinibatchLoss:
    """Computes the losses of six rows in three groups of ages 0 to 2."""

    rows = Minibatch([group(i, version=4 - i) for i in range(3)], 4, 0).rows(advantages=[torch.ones(())] * 6)
    minibatch: Any = SimpleNamespace(index=0, prox_is_start=False, version=4)
    losses = MinibatchLoss(Objective(), None, minibatch, 12.0, 12.0)
    for part in (rows[:3], rows[3:]):
        padded = pad_rows(part)
        logp = torch.full(padded.mask.shape, -1.0, device=device, requires_grad=True)
        found = PassOutputs(padded.to(device), logp, torch.ones_like(logp))
        assert losses.add(padded, found).device == device
    assert isinstance(losses.loss, Tensor) and losses.loss.device == device
    assert losses.sums.count == 12 and sorted(losses.sums.ages) == [0, 1, 2]
    return losses


def test_a_micro_batch_waits_for_nothing() -> None:
    """Tensors on the meta device have no values, so reading one fails, where on a GPU it would wait."""
    losses = two_micro_batches(torch.device("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses.outputs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_micro_batch_waits_for_no_gpu() -> None:
    device = torch.device("cuda", 0)
    expected = two_micro_batches(torch.device("cpu")).outputs()["tokens"]
    two_micro_batches(device)  # sets up what is needed only once
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = two_micro_batches(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = TokenSums.from_plain(losses.outputs()["tokens"].to_plain())
    assert token_metrics([found]) == pytest.approx(token_metrics([expected]))
