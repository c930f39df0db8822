"""The loss of preference pairs, checked against numbers worked out by hand and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.objectives import close, loss_and_gradient, part_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.opa_dpo import OPADPO, unlikeliness
from popo_lightning.objectives.advantages import GroupNormalized, LeaveOneOut
from popo_lightning.objectives.aggregations import PairMean, SequenceMean
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.pair_loss import PairLoss
from popo_lightning.objectives.regularizers import KL
from popo_lightning.objectives.trust_regions import PPOClip, Unbounded
from popo_lightning.objectives.weights import NoCorrection, TruncatedIS


def objective(region: PairLoss) -> Objective:
    return Objective(NoCorrection(), region, aggregation=PairMean())


def with_rivals(region: PairLoss, rows: ObjectiveInputs) -> ObjectiveInputs:
    """Makes rows 2i and 2i + 1 a pair."""
    rows.rival = region.log_ratios(rows).view(-1, 2).flip(1).view(-1, 1)
    return rows


def random_pairs(pairs: int = 4, tokens: int = 5, moved: float = 0.5) -> ObjectiveInputs:
    """Returns stale float64 pairs of uneven lengths, NaN at padding. Every second pair has two fresh responses."""
    draw = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(2 * pairs, tokens, generator=draw, dtype=torch.float64)

    prox = -normal().abs()
    mask = torch.arange(tokens) < (torch.arange(2 * pairs) * 2 % tokens + 1)[:, None]
    logps = prox + moved * normal(), prox, prox + 0.7 * normal(), prox + 0.3 * normal()
    logp, prox, behave, ref = (torch.where(mask, each, math.nan) for each in logps)
    return ObjectiveInputs(
        logp=logp.requires_grad_(),
        prox_logp=prox,
        behave_logp=behave,
        advantages=torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(pairs, 1),
        mask=mask,
        fresh=(torch.arange(pairs) % 2 == 0).repeat_interleave(2),
        ref_logp=ref,
    )


def one_token(
    log_ratios: list[float], stale: list[float] | None = None, fresh: bool = False, prox: float = -1.0
) -> ObjectiveInputs:
    """Returns one-token responses, chosen and rejected in turn, with these log(policy / prox) and prox / behave."""
    count = len(log_ratios)
    center = torch.full((count, 1), prox, dtype=torch.float64)
    weights = torch.ones(count, 1) if stale is None else torch.tensor(stale)[:, None]
    return ObjectiveInputs(
        logp=(center + torch.tensor(log_ratios, dtype=torch.float64)[:, None]).requires_grad_(),
        prox_logp=center,
        behave_logp=center - weights.double().log(),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(count // 2)[:, None],
        mask=torch.ones(count, 1, dtype=torch.bool),
        fresh=torch.full((count,), fresh),
    )


# -- closed forms --------------------------------------------------------------------------------------------------


def test_at_the_reference_a_pair_costs_log_2_and_pushes_by_half_of_beta() -> None:
    region = PairLoss(beta=0.3)
    rows = with_rivals(region, random_pairs(moved=0.0))
    loss, gradient = loss_and_gradient(objective(region), rows, 4)
    close(loss, math.log(2), rtol=1e-12, atol=0)
    close(gradient, torch.where(rows.mask, -0.15 * rows.advantages / 4, 0.0), rtol=1e-12, atol=0)


def test_a_pair_by_hand() -> None:
    """D+ = 1, D- = -0.5, beta 0.4: the margin is 0.6, log(1 + e^-0.6) = 0.437488, 0.4 sigmoid(-0.6) = 0.141737."""
    region = PairLoss(beta=0.4)
    loss, gradient = loss_and_gradient(objective(region), with_rivals(region, one_token([1.0, -0.5])), 1)
    close(loss, 0.4374880)
    close(gradient, [[-0.1417375], [0.1417375]])
    # the wrong way round: margin -0.6, log(1 + e^0.6) = 1.037488, 0.4 sigmoid(0.6) = 0.258263
    loss, gradient = loss_and_gradient(objective(region), with_rivals(region, one_token([-0.5, 1.0])), 1)
    close(loss, 1.0374880)
    close(gradient, [[-0.2582625], [0.2582625]])


def test_the_anchor_by_hand() -> None:
    """Only the winner has one: log(1 + e^-0.4) = 0.513015, and 0.4 sigmoid(-0.4) = 0.160525, twice for anchor 2."""
    region = OPADPO(beta=0.4, anchor=2.0, opa=0.0)
    loss, gradient = loss_and_gradient(objective(region), with_rivals(region, one_token([1.0, -0.5])), 1)
    close(loss, 0.4374880 + 2 * 0.5130153)
    close(gradient, [[-0.1417375 - 2 * 0.1605250], [0.1417375]])


def test_imitation_by_hand() -> None:
    """Winners have prox / behave 0.25, 3 and 0.25 (fresh), one loser 0.25. Only the first is imitated, by 0.75."""
    region = OPADPO(beta=0.4, anchor=0.0, opa=0.2)
    plain = PairLoss(beta=0.4)
    for stale, fresh, weight in (([0.25, 1.0], False, 0.75), ([3.0, 0.25], False, 0.0), ([0.25, 1.0], True, 0.0)):
        rows = with_rivals(region, one_token([1.0, -0.5], stale, fresh))
        loss, gradient = loss_and_gradient(objective(region), rows, 1)
        without, gradient_without = loss_and_gradient(objective(plain), rows, 1)
        close(loss - without, 0.2 * weight * -(-1.0 + 1.0), atol=1e-12)  # log pi of the winner is prox + 1 = 0
        close(gradient - gradient_without, [[-0.2 * weight], [0.0]])
    rows = with_rivals(region, one_token([1.0, -0.5], [0.25, 1.0], prox=-3.0))  # log pi is -2
    loss, _ = loss_and_gradient(objective(region), rows, 1)
    close(loss, 0.4374880 + 0.2 * 0.75 * 2)


def test_a_response_is_unlikely_by_its_geometric_mean() -> None:
    """Tokens of 0.25 and 1: the root of 0.25 is 0.5. Length alone makes no response unlikely."""
    rows = one_token([0.0, 0.0])
    rows.behave_logp = rows.prox_logp - torch.tensor([[0.25, 1.0, 7.0], [0.25, 0.25, 0.25]]).double().log()
    rows.prox_logp = rows.prox_logp.expand(2, 3)
    rows.mask = torch.tensor([[True, True, False], [True, True, True]])
    close(unlikeliness(rows), [[0.5], [0.75]])


def written_out(rows: ObjectiveInputs, beta: float, anchor: float, opa: float, first: bool = False) -> Tensor:
    """Computes the mean over pairs with both responses in one graph."""
    logp = torch.where(rows.mask, rows.logp, 0.0).sum(-1)
    center = rows.ref_logp if first else rows.prox_logp
    assert center is not None
    d = logp - torch.where(rows.mask, center, 0.0).sum(-1)
    change = torch.where(rows.mask, rows.prox_logp - rows.behave_logp, 0.0).sum(-1) / rows.mask.sum(-1)
    unlikely = (1 - change.exp().clamp(max=1)) * ~rows.fresh
    best, worst = slice(0, None, 2), slice(1, None, 2)
    loss = -logsigmoid(beta * (d[best] - d[worst])) - anchor * logsigmoid(beta * d[best])
    return (loss - opa * unlikely[best] * logp[best]).mean()


def test_the_gradient_is_that_of_both_responses_in_one_graph() -> None:
    for first in (False, True):
        region = OPADPO(0.7, "first" if first else "prox", anchor=0.6, opa=0.4)
        rows = with_rivals(region, random_pairs())
        expected = written_out(rows, 0.7, 0.6, 0.4, first)
        (gradient,) = torch.autograd.grad(expected, rows.logp)
        loss, found = loss_and_gradient(objective(region), rows, 4)
        close(loss, expected.detach(), rtol=1e-12, atol=0)
        close(found, gradient, rtol=1e-12, atol=1e-15)


def test_rows_of_a_pair_may_come_one_by_one() -> None:
    region = OPADPO(0.7, anchor=0.6, opa=0.4)
    rows = with_rivals(region, random_pairs())
    loss, gradient = loss_and_gradient(objective(region), rows, 4)
    parts = [loss_and_gradient(objective(region), part_of(rows, slice(i, i + 1)), 4) for i in (5, 0, 7, 2, 1, 6, 3, 4)]
    close(sum((part for part, _ in parts), torch.tensor(0.0).double()), loss, rtol=1e-12, atol=0)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4]).argsort()
    close(torch.cat([part for _, part in parts])[order], gradient, rtol=1e-12, atol=1e-15)


def test_a_row_that_is_no_part_of_a_pair_costs_nothing() -> None:
    for region in (PairLoss(), OPADPO(anchor=0.5, opa=0.5)):
        rows = with_rivals(region, random_pairs())
        rows.advantages = torch.zeros_like(rows.advantages)
        loss, gradient = loss_and_gradient(objective(region), rows, 4)
        assert float(loss) == 0 and not gradient.any()


def test_a_large_margin_overflows_nothing() -> None:
    region = PairLoss(beta=100.0)
    for log_ratios, expected in (([30.0, -10.0], 0.0), ([-30.0, 10.0], 4000.0)):
        loss, gradient = loss_and_gradient(objective(region), with_rivals(region, one_token(log_ratios)), 1)
        close(loss, expected)
        close(gradient, [[-100.0], [100.0]] if expected else [[0.0], [0.0]])


# -- what it becomes -----------------------------------------------------------------------------------------------


def test_a_small_beta_is_reinforce_on_groups_of_two() -> None:
    """For rewards 1 and 0, Dr.GRPO's advantages are +-1/2, RLOO's +-1. The push on a log-prob is beta sigmoid(0)."""
    beta = 1e-7
    rows = with_rivals(PairLoss(beta), random_pairs())
    _, pairwise = loss_and_gradient(objective(PairLoss(beta)), rows, 4)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for advantage, factor in ((GroupNormalized(normalize_by_std=False), 1.0), (LeaveOneOut(), 0.5)):
        rows.advantages = advantage(rewards).view(2, 1).repeat(4, 1)
        plain = Objective(NoCorrection(), Unbounded(weighted=False), aggregation=PairMean())
        _, reinforce = loss_and_gradient(plain, rows, 4)
        close(pairwise / beta, factor * reinforce, rtol=1e-5)


def test_fresh_pairs_of_opa_dpo_without_an_anchor_are_online_dpo() -> None:
    rows = with_rivals(PairLoss(), random_pairs())
    rows.fresh[:] = True
    ours, plain = (loss_and_gradient(objective(each), rows, 4) for each in (OPADPO(anchor=0.0), PairLoss()))
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_a_constant_on_all_responses_of_a_prompt_changes_nothing() -> None:
    region = PairLoss(0.4)
    found = [
        loss_and_gradient(objective(region), with_rivals(region, one_token([1.0 + c, -0.5 + c])), 1) for c in (0.0, 3.0)
    ]
    close(found[0][0], found[1][0], rtol=1e-12)
    close(found[0][1], found[1][1], rtol=1e-12)


def test_a_pair_of_less_weight() -> None:
    region = PairLoss(0.4)
    rows = with_rivals(region, one_token([1.0, -0.5, 1.0, -0.5]))
    rows.loss_weight = torch.tensor([1.0, 1.0, 0.25, 0.25])
    loss, gradient = loss_and_gradient(objective(region), rows, 2)
    close(loss, 0.4374880 * 1.25 / 2)
    close(gradient, [[-0.0708687], [0.0708687], [-0.0177172], [0.0177172]])


# -- what is learned from it ---------------------------------------------------------------------------------------


def all_pairs(answers: int) -> tuple[Tensor, Tensor]:
    """Returns (chosen, rejected) of all ordered pairs of answers."""
    ordered = [(i, j) for i in range(answers) for j in range(answers) if i != j]
    chosen, rejected = zip(*ordered, strict=True)
    return torch.tensor(chosen), torch.tensor(rejected)


def test_the_fixed_point_is_the_reference_tilted_by_the_reward() -> None:
    """For labels of a Bradley-Terry reward r, softmax(log reference + r / beta) is the best policy (2305.18290)."""
    beta, region = 0.5, PairLoss(beta=0.5, reference="first")
    reward = torch.tensor([0.9, 0.1, -0.4, 0.6, -1.0], dtype=torch.float64)
    reference = torch.tensor([0.3, -1.0, 0.8, 0.0, 0.5], dtype=torch.float64).log_softmax(-1)
    chosen, rejected = all_pairs(5)
    answers = torch.stack((chosen, rejected), dim=1).flatten()
    likely = torch.sigmoid(reward[chosen] - reward[rejected]).repeat_interleave(2)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)[answers][:, None]
        fixed = {"prox_logp": logp.detach(), "behave_logp": logp.detach(), "ref_logp": reference[answers][:, None]}
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(chosen))[:, None]
        rows = ObjectiveInputs(
            logp=logp,
            advantages=signs,
            mask=torch.ones_like(logp, dtype=torch.bool),
            fresh=torch.ones(len(logp), dtype=torch.bool),
            loss_weight=likely,
            **fixed,
        )
        loss, _ = objective(region)(with_rivals(region, rows), len(chosen))
        loss.backward()
        return loss

    optimizer.step(closure)
    found, expected = logits.detach().softmax(-1), (reference + reward / beta).softmax(-1)
    assert float((found - expected).abs().max()) < 1e-3
    assert float((reference.exp() - expected).abs().max()) > 0.1  # the reference is far from the optimum


def chance_of_the_winner(region: PairLoss, steps: int = 50) -> list[float]:
    """Returns chances of a stored winner and loser, each before and after training on their pair alone.

    Answers share features: a step that lowers the loser (1.5, 0.5) also lowers the winner (1, 0), in favour of a third
    answer (0, 0). The winner was sampled with a chance of about 0.3 and has become unlikely.
    """
    features = torch.tensor([[1.0, 0.0], [1.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([-4.0, 0.0], dtype=torch.float64, requires_grad=True)
    behave = torch.tensor([0.3, 0.3], dtype=torch.float64).log()[:, None]
    before = (features @ weights).softmax(-1).tolist()
    for _ in range(steps):
        logp = (features @ weights).log_softmax(-1)[:2, None]
        signs, mask = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool)
        rows = ObjectiveInputs(logp, logp.detach(), behave, signs, mask, torch.tensor([False, False]))
        loss, _ = objective(region)(with_rivals(region, rows), 1)
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = (weights - gradient).detach().requires_grad_()
    after = (features @ weights).softmax(-1).tolist()
    return [before[0], after[0], before[1], after[1]]


def test_a_stored_winner_that_falls_with_its_loser_rises_by_imitation() -> None:
    winner, later, loser, loser_later = chance_of_the_winner(PairLoss())
    assert winner < 0.02 and later < 0.75 * winner and loser_later < loser
    winner, later, *_ = chance_of_the_winner(OPADPO(anchor=0.0, opa=0.1))
    assert later > 5 * winner


# -- reports and refusals ------------------------------------------------------------------------------------------


def test_margins_of_a_minibatch_are_reported() -> None:
    region = PairLoss()
    assert region.report() == {}
    found = objective(region).for_pairs(torch.tensor([2.0, -1.0, 0.0, 3.0]))
    assert found.report() == {"pair_margin": 1.0, "pair_accuracy": 0.625}
    assert region.report() == {} == objective(region).for_pairs(torch.empty(0)).report()


def test_ratios_for_the_log_are_to_prox() -> None:
    region = PairLoss(reference="first")
    rows = with_rivals(region, random_pairs())
    _, statistics = objective(region)(rows, 4)
    close(statistics.ratio[rows.mask], (rows.logp.detach() - rows.prox_logp).exp()[rows.mask])
    assert not statistics.clipped.any() and not statistics.ratio.isnan().any()
    found = region(rows, torch.ones_like(rows.prox_logp))
    assert not found.loss[~rows.mask].any() and (found.ratio[~rows.mask] == 1).all()


def test_what_makes_no_sense_is_refused() -> None:
    for build, sentence in (
        (lambda: Objective(TruncatedIS(), PairLoss(), aggregation=PairMean()), "compares responses whoever sampled"),
        (lambda: Objective(NoCorrection(), PairLoss()), "model.aggregation is TokenMean, but PairLoss sums"),
        (lambda: Objective(NoCorrection(), OPADPO(), aggregation=SequenceMean()), "use PairMean"),
        (lambda: PairLoss(beta=0.0), "PairLoss.beta is 0.0"),
        (lambda: OPADPO(beta=-1.0), "OPADPO.beta is -1.0"),
        (lambda: PairLoss(reference="last"), "PairLoss.reference is 'last'"),  # type: ignore[arg-type]
        (lambda: OPADPO(anchor=-1.0), "OPADPO.anchor is -1.0"),
        (lambda: OPADPO(opa=math.inf), "OPADPO.opa is inf"),
    ):
        with pytest.raises(SettingError, match=sentence):
            build()


def test_the_first_policy_is_asked_for_where_it_is_the_reference() -> None:
    assert objective(PairLoss(reference="first")).needs_reference and not objective(PairLoss()).needs_reference
    assert Objective(NoCorrection(), PairLoss(), [KL(0.1)], PairMean()).needs_reference
    assert not PPOClip().needs_reference
    rows = random_pairs()
    with pytest.raises(ValueError, match="rival"):
        objective(PairLoss())(rows, 4)
    rows.ref_logp = None
    with pytest.raises(ValueError, match="reference"):
        PairLoss(reference="first").log_ratios(rows)


def test_a_mean_over_pairs_counts_half_of_the_rows() -> None:
    lengths = torch.tensor([3, 0, 7, 1])
    assert PairMean().size(lengths) == 2.0
    assert PairMean().row_weights(lengths).tolist() == [1.0] * 4
