"""Behavior weights against numbers worked out by hand (no fixtures: test_mutations.py calls these)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.objectives import LOG2, close, loss_and_gradient, random_rows, stale_rows, token_rows

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.asymre import ShiftedBaseline
from popo_lightning.methods.gspo import GSPO
from popo_lightning.methods.pnpo import PNPO, PrefixIS
from popo_lightning.objectives.inputs import ObjectiveInputs, log_ratio
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip
from popo_lightning.objectives.weights import (
    BehaveWeight,
    MaskedIS,
    NoCorrection,
    SequenceIS,
    SmoothedIS,
    TruncatedIS,
    decoupled_weight,
)


def test_log_ratio_clamps_and_clears_padding() -> None:
    a = torch.tensor([[1.0, 50.0, -50.0, math.nan, math.inf]])
    b = torch.tensor([[0.5, 0.0, 0.0, 0.0, math.inf]])
    close(log_ratio(a, b, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])), [[0.5, 20.0, -20.0, 0.0, 0.0]])


def test_decoupled_weight_by_hand() -> None:
    prox = torch.tensor([[LOG2, -LOG2, math.log(8.0), 3.0]])
    rows = stale_rows(prox, torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))
    close(decoupled_weight(rows), [[2.0, 0.5, 8.0, 1.0]])
    weight, raw = TruncatedIS(cap=5.0)(rows)
    close(weight, [[2.0, 0.5, 5.0, 1.0]])
    close(raw, [[2.0, 0.5, 8.0, 1.0]])
    # Without a cap the correction remains.
    close(TruncatedIS(cap=None)(rows)[0], [[2.0, 0.5, 8.0, 1.0]])


def test_fresh_rows_have_weight_one_and_keep_raw() -> None:
    rows = stale_rows(torch.full((2, 2), LOG2), torch.zeros(2, 2), torch.ones(2, 2))
    rows.fresh = torch.tensor([True, False])
    weight, raw = TruncatedIS()(rows)
    close(weight, [[1.0, 1.0], [2.0, 2.0]])
    close(raw, [[2.0, 2.0], [2.0, 2.0]])
    close(TruncatedIS(correct_fresh=True)(rows)[0], [[2.0, 2.0], [2.0, 2.0]])
    weight, raw = NoCorrection()(rows)
    close(weight, [[1.0, 1.0], [1.0, 1.0]])
    close(raw, [[2.0, 2.0], [2.0, 2.0]])


def test_no_gradient_through_the_weight() -> None:
    rows = random_rows()
    rows.prox_logp.requires_grad_()
    rows.behave_logp.requires_grad_()
    assert not decoupled_weight(rows).requires_grad
    loss, _ = Objective()(rows, 1.0)
    loss.backward()
    assert rows.logp.grad is not None
    assert rows.prox_logp.grad is None
    assert rows.behave_logp.grad is None


def eight() -> ObjectiveInputs:
    """Two replayed rows have weights 8, 0.25, 2 and 4, 0.5 (one place is padded). prox's own ratio is 3."""
    return token_rows([[3.0, 3.0, 3.0], [3.0, 3.0, math.nan]], [[1.0], [1.0]], [[8.0, 0.25, 2.0], [4.0, 0.5, math.nan]])


RAW = [[8.0, 0.25, 2.0], [4.0, 0.5, 1.0]]


def test_masked_tokens_count_in_the_denominator() -> None:
    # With ratios 1, A = 1 and weights 8, 1, 2 the last two are kept: sum -3. AReaL divides by 3 tokens, verl by those
    # 2.
    rows = token_rows([[1.0, 1.0, 1.0]], [[1.0]], [[8.0, 1.0, 2.0]])
    loss, _ = loss_and_gradient(Objective(MaskedIS()), rows)
    close(loss, -3 / 3)


def test_rules_by_hand() -> None:
    cases: list[tuple[BehaveWeight, list[list[float]]]] = [
        (TruncatedIS(cap=None), RAW),
        (TruncatedIS(cap=2.0), [[2.0, 0.25, 2.0], [2.0, 0.5, 1.0]]),
        (MaskedIS(), [[0.0, 0.0, 2.0], [0.0, 0.5, 1.0]]),  # within [0.5, 2], including the ends
        (MaskedIS(0.0, 5.0), [[0.0, 0.25, 2.0], [4.0, 0.5, 1.0]]),  # AReaL's drop
        (MaskedIS(1.0, 1.0), [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        # 8 * 0.25 * 2 = 4 over three tokens, 4 * 0.5 = 2 over two. Padding stays 1.
        (SequenceIS("product", cap=None), [[4.0, 4.0, 4.0], [2.0, 2.0, 1.0]]),
        (SequenceIS("product", cap=3.0), [[3.0, 3.0, 3.0], [2.0, 2.0, 1.0]]),
        (SequenceIS("geometric_mean"), [[4 ** (1 / 3)] * 3, [2**0.5, 2**0.5, 1.0]]),
        (SequenceIS("geometric_mean", cap=1.5), [[1.5] * 3, [2**0.5, 2**0.5, 1.0]]),
        (SmoothedIS(0.5), [[8**0.5, 0.5, 2**0.5], [2.0, 0.5**0.5, 1.0]]),
        (SmoothedIS(0.5, cap=2.0), [[2.0, 0.5, 2**0.5], [2.0, 0.5**0.5, 1.0]]),
        (SmoothedIS(0.0), [[1.0] * 3] * 2),
        (SmoothedIS(1.0), RAW),
        (NoCorrection(), [[1.0] * 3] * 2),
    ]
    for rule, expected in cases:
        weight, raw = rule(eight())
        close(weight, expected)
        close(raw, RAW)
        assert not weight.requires_grad and not raw.requires_grad


def test_fresh_rows_are_corrected_only_where_asked() -> None:
    rules: list[Callable[[bool], BehaveWeight]] = [
        lambda both: TruncatedIS(cap=2.0, correct_fresh=both),
        lambda both: MaskedIS(correct_fresh=both),
        lambda both: SequenceIS("product", correct_fresh=both),
        lambda both: SmoothedIS(correct_fresh=both),
    ]
    for rule in rules:
        rows = eight()
        replayed, raw = rule(False)(rows)
        rows.fresh = torch.tensor([True, False])
        mixed, same = rule(False)(rows)
        close(mixed[0], [1.0, 1.0, 1.0])
        assert torch.equal(mixed[1], replayed[1]) and (mixed[1, :2] != 1).all()
        assert torch.equal(raw, same)
        assert torch.equal(rule(True)(rows)[0], replayed)


def test_weights_know_no_padding() -> None:
    for rule in (TruncatedIS(), MaskedIS(), SequenceIS("product"), SequenceIS(), SmoothedIS()):
        rows, poisoned = random_rows(), random_rows()
        for name, poison in (("prox_logp", math.nan), ("behave_logp", math.inf)):
            setattr(poisoned, name, torch.where(rows.mask, getattr(rows, name), poison))
        weight, raw = rule(poisoned)
        assert torch.equal(weight, rule(rows)[0])
        assert torch.equal(weight[~rows.mask], torch.ones_like(weight[~rows.mask])), type(rule).__name__
        assert torch.equal(raw[~rows.mask], torch.ones_like(raw[~rows.mask]))


def test_sequence_weight_is_bounded_in_the_exponent() -> None:
    rows = token_rows([[1.0] * 3], [[1.0]], [[math.exp(15.0)] * 3])
    close(SequenceIS("product", cap=None)(rows)[0].log(), [[20.0] * 3])
    close(SequenceIS("geometric_mean", cap=None)(rows)[0].log(), [[15.0] * 3])


def test_sequence_and_token_weights_are_one_for_one_token_answers() -> None:
    rows = random_rows(rows=8, tokens=1)
    for ratio in ("product", "geometric_mean"):
        assert torch.equal(SequenceIS(ratio)(rows)[0], TruncatedIS()(rows)[0])  # type: ignore[arg-type]


def test_product_makes_the_estimate_unbiased() -> None:
    # behave samples words of two letters from an alphabet of two. The weighted mean of a function of the word is prox's
    # mean.
    prox, behave = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    words = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    values = torch.tensor([1.0, -2.0, 5.0, 3.0])
    rows = stale_rows(prox[words].log(), behave[words].log(), torch.ones(4, 2, dtype=torch.bool))
    weight, _ = SequenceIS("product", cap=None)(rows)
    estimate = (behave[words].prod(-1) * weight[:, 0] * values).sum()
    close(estimate, (prox[words].prod(-1) * values).sum())


def test_bad_settings_of_weights_are_one_sentence() -> None:
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: TruncatedIS(cap=0.5), "TruncatedIS.cap is 0.5"),
        (lambda: TruncatedIS(cap=math.nan), "TruncatedIS.cap is nan"),
        (lambda: MaskedIS(low=1.1), "MaskedIS.low is 1.1"),
        (lambda: MaskedIS(low=-0.1), "MaskedIS.low is -0.1"),
        (lambda: MaskedIS(high=0.9), "MaskedIS.high is 0.9"),
        (lambda: SequenceIS("mean"), "SequenceIS.ratio is 'mean'"),  # type: ignore[arg-type]
        (lambda: SequenceIS(cap=0.5), "SequenceIS.cap is 0.5"),
        (lambda: SmoothedIS(alpha=1.5), "SmoothedIS.alpha is 1.5"),
        (lambda: SmoothedIS(cap=0.0), "SmoothedIS.cap is 0.0"),
        (lambda: TruncatedIS(cap=1e308), "TruncatedIS.cap is 1e+308, which float32 cannot hold"),
        (lambda: MaskedIS(high=1e39), "MaskedIS.high is 1e+39, which float32 cannot hold"),
        (lambda: SequenceIS(cap=1e39), "SequenceIS.cap is 1e+39, which float32 cannot hold"),
        (lambda: SmoothedIS(cap=1e39), "SmoothedIS.cap is 1e+39, which float32 cannot hold"),
        (lambda: PrefixIS(cap=1e39), "PrefixIS.cap is 1e+39, which float32 cannot hold"),
        (lambda: PNPO(max_ratio=1e39), "PNPO.max_ratio is 1e+39, which float32 cannot hold"),
        (lambda: GSPO(clip_high=1e39), "GSPO.clip_high is 1e+39, which float32 cannot hold"),
        (lambda: PPOClip(dual_clip=1e39), "PPOClip.dual_clip is 1e+39, which float32 cannot hold"),
        (lambda: ShiftedBaseline(-1e39), "ShiftedBaseline.shift is -1e+39, which float32 cannot hold"),
    ]
    for build, message in bad:
        with pytest.raises(SettingError) as caught:
            build()
        assert message in str(caught.value) and str(caught.value).endswith(".")
