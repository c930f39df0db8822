"""Limits on mean costs: the multiplier by hand, the optimum of a bandit, the charges of responses, and refusals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.bandit import BEST_LAMBDA, BEST_LONG, BOUND, trained
from helpers.groups import GivenIteration, group, ids, iteration, response

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.popo_ablations import KLRanked, Stale
from popo_lightning.methods.popo_gated import GatedReplay
from popo_lightning.methods.popo_rested import RestedReplay
from popo_lightning.methods.score_priority import ScorePriority
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.policy import PolicyModule
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer
from popo_lightning.rollout.iteration import IterationRollouts
from popo_lightning.rollout.limit_settings import Limit
from popo_lightning.rollout.limits import MIN_LAMBDA, Limits, Multiplier, with_kl


def of_lengths(id: int, lengths: Sequence[int], scores: Sequence[float] | None = None, prefix: int = 0) -> Group:
    scores = [1.0] * len(lengths) if scores is None else scores
    responses = [response(range(1, n + 1), score=score) for n, score in zip(lengths, scores, strict=True)]
    return replace(group(id), responses=responses, prefix_tokens=prefix)


def learned(limits: Limits, *groups: Group) -> dict[str, float]:
    limits.charged(groups, groups, None, 0)
    return limits.metrics()


# -- the multiplier --------------------------------------------------------------------------------------------


def test_the_multiplier_by_hand() -> None:
    """Groups have mean length 4 and 8: mean 6, standard error 2. k 0.5 gives 7, which exceeds the bound 5 by 40%."""
    limits = Limits({"length": Limit(5, k=0.5, c=10, lr=0.05, start=0.1)}, 16)
    found = learned(limits, of_lengths(0, [3, 5]), of_lengths(1, [8, 8]))
    assert found["limits/length/value"] == 6 and found["limits/length/bound"] == 5
    assert found["limits/length/violated"] == 1
    assert found["limits/length/lambda"] == pytest.approx(0.1)
    assert found["limits/length/multiplier"] == pytest.approx(0.1 + 10 * 0.4)
    again = learned(limits, of_lengths(2, [4, 4]), of_lengths(3, [5, 5]))  # mean 4.5, error 0.5, bound 4.75: 0.05 below
    assert again["limits/length/lambda"] == pytest.approx(0.1 * math.exp(0.05)), "Adam's first step is lr, upwards"
    assert again["limits/length/multiplier"] == 0 and again["limits/length/violated"] == 0


def test_one_group_has_no_standard_error() -> None:
    limits = Limits({"length": Limit(5, k=3, c=1, start=0.5)}, 16)
    assert learned(limits, of_lengths(0, [4, 6]))["limits/length/multiplier"] == pytest.approx(0.5)


def test_lambda_is_bounded_from_below_and_returns() -> None:
    multiplier = Multiplier(Limit(5, c=0, lr=0.5).named("length", 16))
    for _ in range(20):
        multiplier.measured([1.0, 1.0])
    assert multiplier.metrics()["lambda"] == pytest.approx(MIN_LAMBDA)
    for _ in range(20):
        multiplier.measured([15.0, 15.0])
    assert multiplier.metrics()["lambda"] > 10 * MIN_LAMBDA


def test_learning_rate_0_and_c_0_is_a_fixed_penalty() -> None:
    limits = Limits({"length": Limit(5, lr=0, c=0, start=0.7)}, 16)
    for lengths in ([2, 2], [15, 15], [1, 1]):
        assert learned(limits, of_lengths(0, lengths))["limits/length/multiplier"] == pytest.approx(0.7)


def test_however_ranks_share_the_groups_the_multiplier_has_the_same_bits() -> None:
    """The plain sums of the costs depend on the order of their terms."""
    random = Random(3)
    costs = [[random.random() * 10 ** random.randint(-3, 3) for _ in range(24)] for _ in range(20)]
    assert len({sum(sorted(costs[0], key=lambda _: random.random())) for _ in range(50)}) > 1
    found = []
    for order in range(4):
        multiplier = Multiplier(Limit(40.0, unit=3.0).named("part", 16))
        for of_iteration in costs:
            dealt = of_iteration[order:] + of_iteration[:order] if order % 2 else sorted(of_iteration)
            multiplier.measured(dealt)
        found.append(multiplier.state_dict())
    assert [(each["price"], each["log_lambda"]) for each in found] == [(found[0]["price"], found[0]["log_lambda"])] * 4


def test_the_optimum_of_two_answers() -> None:
    """p(long) 0.375, cost 0.5 and lambda 0.375 are the solution. k keeps the mean slightly below the bound."""
    found = trained(Limit(BOUND), iterations=250)
    last = 80
    assert statistics.mean(found.long[-last:]) == pytest.approx(BEST_LONG, abs=0.04)
    assert BOUND * 0.94 < statistics.mean(found.value[-last:]) <= BOUND * 1.02
    assert found.limits.metrics()["limits/cost/lambda"] == pytest.approx(BEST_LAMBDA, abs=0.1)


def test_plain_dual_ascent_overshoots_more() -> None:
    """With k 0 and c 0 the cost exceeds the bound until lambda has grown, and then falls far below."""
    augmented, plain = (trained(limit, iterations=250) for limit in (Limit(BOUND), Limit(BOUND, k=0, c=0)))
    overshoot = [sum(max(0.0, value - BOUND) for value in found.value) for found in (augmented, plain)]
    assert overshoot[1] > 5 * overshoot[0] > 0


def test_a_bound_above_the_unconstrained_cost_changes_nothing() -> None:
    """The cost is at most 1 and c is 10, so the multiplier is 0 from the first iteration on, and every bit is equal."""
    limited, free = trained(Limit(1.02), iterations=100), trained(None, iterations=100)
    assert limited.long == free.long
    found = limited.limits.metrics()
    assert found["limits/cost/multiplier"] == 0 and found["limits/cost/lambda"] < 0.1


# -- what is charged -------------------------------------------------------------------------------------------


def test_charges_are_centred_in_the_group_and_not_divided_by_its_spread() -> None:
    limits = Limits({"length": Limit(4, lr=0, c=0, start=2.0)}, 16)
    fresh = [of_lengths(0, [2, 4, 6]), of_lengths(1, [3, 3, 3])]
    minibatch = Minibatch(limits.charged(fresh, fresh, None, 0), 0, 0)
    # Lengths in units of the bound are 0.5, 1 and 1.5, so the charges are 2 times -0.5, 0 and 0.5.
    charged = minibatch.charged([torch.tensor(0.25)] * 6)
    assert torch.stack(charged).tolist() == [1.25, 0.25, -0.75, 0.25, 0.25, 0.25]
    per_token = minibatch.charged([torch.zeros(n) for n in (2, 4, 6, 3, 3, 3)])
    assert [row.tolist() for row in per_token[:3]] == [[1.0] * 2, [0.0] * 4, [-1.0] * 6]


def test_a_group_that_differs_in_cost_alone_is_effective_while_the_limit_costs() -> None:
    costly, free = Limits({"length": Limit(4, lr=0, c=0, start=1.0)}, 16), Limits({"length": Limit(15)}, 16)
    for limits, effective in ((costly, [True, False]), (free, [False, False])):
        fresh = [of_lengths(0, [2, 6]), of_lengths(1, [3, 3])]
        limits.charged(fresh, fresh, None, 0)
        assert [found.is_effective() for found in limits.priced(fresh)] == effective


def test_combined_rewards_decide() -> None:
    """A right answer whose length costs as much as its reward is worth no more than a wrong one."""
    limits = Limits({"length": Limit(4, lr=0, c=0, start=1.0)}, 16)
    fresh = [of_lengths(0, [8, 4], scores=[1.0, 0.0])]
    assert not limits.charged(fresh, fresh, None, 0)[0].is_effective()


def test_stored_groups_are_charged_at_the_present_multiplier() -> None:
    limits = Limits({"length": Limit(4, c=1, lr=0, start=1e-9)}, 32)
    first = limits.charged([of_lengths(0, [4, 8])], [of_lengths(0, [4, 8])], None, 0)
    assert first[0].penalties().tolist() == pytest.approx([0.5, 1.0])  # mean 6 exceeds the bound by 0.5 of it
    again = limits.charged([of_lengths(1, [16, 16])], first, None, 1)  # exceeds it by 3
    assert again[0].penalties().tolist() == pytest.approx([3.0, 6.0])


@dataclass
class Priced(GivenIteration):
    """Judges stored groups as a run's iterations do."""

    limits: Limits = field(default_factory=Limits)
    still_effective = IterationRollouts.still_effective  # type: ignore[assignment]


STORES: dict[str, tuple[Composer, int]] = {  # a composer, and the age at which it replays
    "popo": (PrioritizedGroupReplay(GroupReplayBuffer(8, None)), 1),
    "gated": (GatedReplay(GroupReplayBuffer(8, None), 0), 1),
    "ranked": (KLRanked(GroupReplayBuffer(8, None)), 1),
    "stale": (Stale(GroupReplayBuffer(None, None), 1), 1),
    "rested": (RestedReplay(1, 0), 1),
    "score priority": (ScorePriority(), 1),
}


@pytest.mark.parametrize("name", STORES)
def test_a_stored_group_that_no_longer_has_a_gradient_is_not_replayed(name: str) -> None:
    """It was effective by its lengths alone, and lengths cost nothing any more."""
    composer, age = STORES[name]
    limits = Limits({"length": Limit(4, lr=0, c=0, start=1.0)}, 16)
    limits.charged([of_lengths(9, [4, 4])], [], None, 0)

    def at(version: int, *fresh: Group) -> list[int]:
        made = iteration(version, limits.priced(fresh), present_logprobs=unmoved)
        own = Priced(**{each.name: getattr(made, each.name) for each in fields(GivenIteration)}, limits=limits)
        return sorted(ids(composer.compose(own)))

    stored = of_lengths(0, [4, 6]), of_lengths(1, [4, 4], scores=[1.0, 0.0])
    assert at(0, *stored) == [0, 1]
    limits.multipliers["length"].price = 0.0
    failed = [replace(of_lengths(id, [2, 2], scores=[0.0, 0.0]), version=age) for id in (2, 3)]
    assert 0 not in (found := at(age, *failed)) and 1 in found
    limits.multipliers["length"].price = 1.0
    again = [replace(of_lengths(id, [2, 2], scores=[0.0, 0.0]), version=2 * age) for id in (4, 5)]
    assert 0 in at(2 * age, *again), "it was not dropped"


def unmoved(groups: Sequence[Group]) -> list[list[torch.Tensor]]:
    return [[each.behave_logp for each in found.responses] for found in groups]


def test_nothing_sampled_leaves_the_multiplier() -> None:
    limits = Limits({"length": Limit(4)}, 32)
    assert limits.metrics() == {}
    before = learned(limits, of_lengths(0, [8, 8]))
    assert learned(limits) == before


def test_responses_that_continue_a_prefix_are_charged_with_it_but_not_measured() -> None:
    limits = Limits({"length": Limit(4, lr=0, c=0, start=1.0)}, 32)
    whole, continued = of_lengths(0, [4, 4]), of_lengths(1, [1, 3], prefix=4)
    priced = limits.charged([whole, continued], [continued], None, 0)
    assert limits.metrics()["limits/length/value"] == 4
    assert priced[0].penalties().tolist() == pytest.approx([1.25, 1.75])


def test_a_critic_learns_the_reward_without_charges() -> None:
    """Returns are the reward at every token. The advantage is reward - value - charge."""
    policy = PolicyModule(path="none", advantage=GAE(whiten=False), critic=Critic())
    limits = Limits({"length": Limit(4, lr=0, c=0, start=1.0)}, 16)
    fresh = [of_lengths(0, [2, 4], scores=[0.0, 1.0])]  # charges -0.25 and 0.25
    minibatch = Minibatch(limits.charged(fresh, fresh, None, 0), 0, 0)
    minibatch.recorded["values"] = [torch.full((2,), 0.5), torch.full((4,), 0.5)]
    rows = policy._rows(minibatch)
    assert [row.tensors["advantages"].tolist() for row in rows] == [[-0.25] * 2, [0.25] * 4]
    assert [row.tensors["returns"].tolist() for row in rows] == [[0.0] * 2, [1.0] * 4]


@pytest.mark.parametrize(
    ("cost", "values"),
    [("truncated", [0.0, 1.0]), ("format", [1.0, 0.0]), ("format_error", [0.0, 1.0]), ("parse_error", [0.25, 0.0])],
)
def test_costs_of_a_response(cost: str, values: list[float]) -> None:
    parts = {"score": 0.0, "acc": 0.0}
    responses = [
        replace(response((1, 2)), parts={**parts, "format": 1.0, "parse_error": 0.25}),
        replace(response((1, 2, 3), finish_reason="length"), parts={**parts, "format": 0.0, "parse_error": 0.0}),
    ]
    graded = replace(group(0), responses=responses)
    limit = Limit(0.5, cost=cost).named("mine", 16)
    assert [limit.of(graded, each) for each in responses] == values
    failed = replace(response(failure="killed"), parts={})
    assert limit.of(graded, failed) == float(cost.endswith("_error"))


def test_divergence_from_the_reference_by_hand() -> None:
    """The cost is the mean of behave - reference over tokens. A group that is fresh and trained on is scored once."""
    asked: list[Minibatch] = []

    def reference_scores(minibatch: Minibatch) -> list[torch.Tensor]:
        asked.append(minibatch)
        return [torch.full((len(each.token_ids),), -0.75) for each in minibatch.responses]

    policy: Any = SimpleNamespace(reference_scores=reference_scores)
    responses = [response((1, 2), logp=(-0.5, -0.25)), response((1,), logp=(-1.0,))]
    one = replace(group(0), responses=responses)
    scored = with_kl([one, one], policy, 0)
    assert [each.parts["kl"] for each in scored[0].responses] == [0.375, -0.25] and scored[1] is scored[0]
    assert len(asked[0].groups) == 1
    continued = replace(one, id=1, critic_only=True)  # this group has a cost too
    scored = with_kl([continued, one], policy, 0)
    assert [len(each.responses) for each in scored] == [2, 2] and scored[0].critic_only
    limits = Limits({"kl": Limit(0.125, lr=0, c=0, start=1.0)}, 16)
    (priced,) = limits.charged([one], [one], policy, 0)
    assert limits.metrics()["limits/kl/value"] == 0.0625
    assert priced.penalties().tolist() == [3.0, -2.0]


# -- state -----------------------------------------------------------------------------------------------------


def test_state_continues_the_multiplier_and_does_not_change_behind_the_back() -> None:
    def fresh(iteration: int) -> list[Group]:
        return [of_lengths(i, [3 + iteration, 5 + i]) for i in range(3)]

    whole, stopped = (Limits({"length": Limit(5)}, 32) for _ in range(2))
    for version in range(4):
        learned(whole, *fresh(version))
        learned(stopped, *fresh(version))
    state = stopped.state_dict()
    learned(stopped, *fresh(9))
    resumed = Limits({"length": Limit(5), "truncated": Limit(0.5)}, 32)
    resumed.load_state_dict(state)
    for version in range(4, 8):
        expected, found = learned(whole, *fresh(version)), learned(resumed, *fresh(version))
        assert expected.items() <= found.items()


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"length": -1}, r"data\.limits\.length\.bound is -1"),
        ({"length": 0.5}, "has at least 1 token"),
        ({"length": 16}, r"no response exceeds, since data\.max_new_tokens is 16"),
        ({"length": math.nan}, r"data\.limits\.length\.bound is nan"),
        ({"truncated": 0}, r"data\.limits\.truncated\.bound is 0"),
        ({"truncated": 1}, "a share never exceeds 1"),
        ({"format_error": 1.5}, "a share never exceeds 1"),
        ({"kl": 0}, r"data\.limits\.kl\.bound is 0"),
        ({"short": Limit(99, cost="length")}, r"data\.limits\.short\.bound is 99, which no response exceeds"),
        ({"length": Limit(5, k=-1)}, r"data\.limits\.length\.k is -1"),
        ({"length": Limit(5, c=-1)}, r"data\.limits\.length\.c is -1"),
        ({"length": Limit(5, lr=-1)}, r"data\.limits\.length\.lr is -1"),
        ({"length": Limit(5, start=0)}, r"data\.limits\.length\.start is 0"),
        ({"length": Limit(5, unit=0)}, r"data\.limits\.length\.unit is 0"),
        ({"length.bound": 5}, r"together, as in --data\.limits\.length '\{bound: 300"),
    ],
)
def test_refused(limits: dict[str, Limit | float], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Limits(limits, 16)


@pytest.mark.parametrize(
    ("cost", "sentence"), [("lenght", r"did you mean length\?"), ("formt_error", r"did you mean format_error\?")]
)
def test_unknown_costs_are_named(cost: str, sentence: str) -> None:
    limits = Limits({"mine": Limit(0.5, cost=cost)}, 16)
    with pytest.raises(SettingError, match=rf"the cost of data\.limits\.mine is '{cost}'.*{sentence}"):
        limits.check_components({"score": 1.0, "acc": 1.0, "format": 1.0})
    limits = Limits({"format_error": 0.5, "length": 5, "kl": 1, "truncated": 0.5}, 16)
    limits.check_components(("score", "acc", "format"))
