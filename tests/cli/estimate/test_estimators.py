"""Compares estimators and STAR with numbers by hand, identities and known values of a small process."""

from __future__ import annotations

import math

import numpy as np
import pytest

from popo_lightning.cli.estimate import estimators, star
from popo_lightning.cli.estimate.bootstrap import mean_over_problems
from popo_lightning.cli.estimate.estimators import (
    clipped,
    doubly_robust,
    geometric,
    importance_sampling,
    per_decision,
    sampled_mean,
)
from popo_lightning.cli.estimate.star import ABSTRACTIONS
from popo_lightning.cli.estimate.trajectories import Trajectories, graded_responses
from popo_lightning.metrics.effective import effective_responses, normalized, too_few, usable

ALL = {
    "is": importance_sampling,
    "pdis": per_decision,
    "clipped": clipped,
    "geometric": geometric,
    "dr": doubly_robust,
} | {f"star/{name}": lambda t, z=z: star.star(t, z(t)) for name, z in ABSTRACTIONS.items()}


def by_hand() -> Trajectories:
    """Returns trajectories with weights 2, 1/2 and 1 and lengths 1, 2 and 3."""
    behave = [np.log([0.25]), np.log([0.5, 0.4]), np.log([0.5, 0.5, 0.5])]
    target = [np.log([0.5]), np.log([0.5, 0.2]), np.log([0.25, 1.0, 0.5])]
    return graded_responses(target, behave, [1.0, 0.0, 0.5])


def test_by_hand() -> None:
    logged = by_hand()
    assert np.exp(logged.log_weights) == pytest.approx([2, 0.5, 1])
    assert list(logged.lengths) == [1, 2, 3] and list(logged.returns) == [1, 0, 0.5]
    assert importance_sampling(logged) == pytest.approx((2 * 1 + 1 * 0.5) / 3.5)
    # At token 1 the weights are 2, 1, 1/2; at token 3 they are 2, 1/2, 1.
    assert per_decision(logged) == pytest.approx(2 / 3.5 + 0.5 / 3.5)
    assert clipped(logged, 1.5) == pytest.approx((1.5 + 0.5) / 3)
    roots = np.array([2, math.sqrt(0.5), 1.0])
    assert geometric(logged) == pytest.approx((2 + 0.5) / roots.sum())
    baselines = np.array([0.25, 0.75, 0.5])
    terms = baselines + np.array([2, 0.5, 1]) * (np.array([1, 0, 0.5]) - baselines)
    assert doubly_robust(logged) == pytest.approx(terms.mean())
    assert effective_responses(logged.log_weights) == pytest.approx(3.5**2 / (4 + 0.25 + 1))
    assert np.exp(logged.last_log_ratios(1)[2]) == pytest.approx([0.5, 2, 1])
    assert np.exp(logged.last_log_ratios(2)[2]) == pytest.approx([0.5, 1, 2])
    # With one state, R = sum of w_t r_t / sum of w_t, and the share that ends is sum over ends / sum of w_t.
    weights, ends = 2 + (1 + 0.5) + (0.5 + 1 + 1), 2 + 0.5 + 1
    assert star.star(logged, star.one(logged)) == pytest.approx((2 + 0.5) / weights / (ends / weights))


def random_process(lengths: str, n: int = 60, steps: int = 6, seed: int = 0) -> Trajectories:
    """Returns made-up ratios, and rewards at every token."""
    random = np.random.default_rng(seed)
    long = np.full(n, steps) if lengths == "equal" else random.integers(1, steps + 1, n)
    alive = np.arange(steps) < long[:, None]
    ratios = random.normal(0, 0.4, (n, steps)) * alive
    return Trajectories(ratios, random.normal(1, 1, (n, steps)) * alive, alive, -random.random((n, steps)) * alive)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_star_by_time_is_per_decision(gamma: float) -> None:
    """2410.02172: with all weights and responses of one length they are equal to the last bits."""
    logged = random_process("equal")
    found = star.star(logged, star.time(logged), gamma=gamma)
    assert found == pytest.approx(per_decision(logged, gamma), abs=1e-15)
    assert found != pytest.approx(sampled_mean(logged), abs=1e-3)


MOVES = np.array([[[0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], [[0.5, 0.5, 0.0], [0.1, 0.3, 0.6]], [[0.3, 0.3, 0.4]] * 2])
GAINS = np.array([[0.2, 1.0], [0.5, 0.1], [0.9, 0.4]])
BEHAVE, TARGET = np.array([0.5, 0.5, 0.5]), np.array([0.7, 0.3, 0.6])  # probabilities of action 1, by state
STEPS = 5


def truth() -> float:
    """Returns the true value by dynamic programming."""
    value = np.zeros(3)
    for _ in range(STEPS):
        of_action = GAINS + MOVES @ value
        value = (1 - TARGET) * of_action[:, 0] + TARGET * of_action[:, 1]
    return float(value[0])


def simulated(n: int, seed: int = 1) -> tuple[Trajectories, np.ndarray]:
    random = np.random.default_rng(seed)
    state, ratios, rewards, states = np.zeros(n, dtype=int), [], [], []
    for _ in range(STEPS):
        action = (random.random(n) < BEHAVE[state]).astype(int)
        ratios.append(
            np.log(np.where(action, TARGET[state] / BEHAVE[state], (1 - TARGET[state]) / (1 - BEHAVE[state])))
        )
        rewards.append(GAINS[state, action])
        states.append(state)
        cumulative = MOVES[state, action].cumsum(1)
        state = (random.random((n, 1)) > cumulative).sum(1)
    logged = np.stack(ratios, 1)
    return Trajectories(logged, np.stack(rewards, 1), np.ones_like(logged, bool), logged * 0), np.stack(states, 1)


def test_known_value_of_a_small_process() -> None:
    """For n = 2000, STAR by time and per-decision agree to 1e-15, and agree with the truth within their noise."""
    logged, states = simulated(2000)
    by_time, weighted = star.star(logged, star.time(logged)), per_decision(logged)
    assert abs(by_time - weighted) <= 1e-15
    assert by_time == pytest.approx(truth(), abs=0.05)
    logged, states = simulated(200_000)
    assert sampled_mean(logged) != pytest.approx(truth(), abs=0.03), "else there is nothing to correct"
    for found in (importance_sampling(logged), per_decision(logged), star.star(logged, star.time(logged))):
        assert found == pytest.approx(truth(), abs=0.012)
    assert doubly_robust(logged) == pytest.approx(truth(), abs=0.02)
    # With all weights any abstraction is consistent, if it tells states apart by their time as well.
    for z in (states + 3 * np.arange(STEPS), star.position(logged)):
        assert star.star(logged, z) == pytest.approx(truth(), abs=0.012)
    # The process's own states need only the last ratio.
    alone = star.star(logged, states + 3 * np.arange(STEPS), last=1)
    assert alone == pytest.approx(truth(), abs=0.006)
    assert star.star(logged, star.time(logged), last=1) != pytest.approx(truth(), abs=0.012)


def test_one_step_is_self_normalized_importance_sampling() -> None:
    random = np.random.default_rng(3)
    logged = graded_responses(list(random.normal(0, 1, (50, 1))), list(random.normal(0, 1, (50, 1))), random.random(50))
    expected = importance_sampling(logged)
    for z in ABSTRACTIONS.values():
        if z is not star.confidence:
            assert star.star(logged, z(logged)) == pytest.approx(expected, abs=1e-14)
    assert per_decision(logged) == pytest.approx(expected, abs=1e-14)
    assert geometric(logged) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_the_same_policy_is_the_sample_mean(name: str) -> None:
    logged = random_process("equal" if name.startswith(("star", "pdis")) else "unequal")
    same = Trajectories(logged.log_ratios * 0, logged.rewards, logged.alive, logged.target_logp)
    assert ALL[name](same) == pytest.approx(sampled_mean(same), abs=1e-12)
    assert effective_responses(same.log_weights) == pytest.approx(60)


@pytest.mark.parametrize("name", ["star/one", "star/position", "star/confidence", "star/time"])
def test_the_same_policy_is_the_sample_mean_at_any_length(name: str) -> None:
    random = np.random.default_rng(5)
    logp = [-random.random(n) for n in random.integers(1, 30, 40)]
    same = graded_responses(logp, logp, random.integers(0, 2, 40).astype(float))
    assert ALL[name](same) == pytest.approx(sampled_mean(same), abs=1e-12)


def test_one_state_is_a_geometric_series() -> None:
    """With reward r at each token and an end with probability q the value is r / (1 - gamma (1 - q))."""
    for gamma in (1.0, 0.8):
        n, q = 4, 0.25  # lengths 1 to 4, uniform weights: 10 visits, 4 ends
        alive = np.arange(n) < np.arange(1, n + 1)[:, None]
        logged = Trajectories(np.zeros((n, n)), 0.3 * alive, alive, np.zeros((n, n)))
        q = 4 / 10
        assert star.star(logged, star.one(logged), gamma=gamma) == pytest.approx(0.3 / (1 - gamma * (1 - q)), abs=1e-14)


def test_an_abstraction_may_not_know_how_long_a_response_becomes() -> None:
    """What follows a token, including the end of its response, changes no state up to it."""
    random = np.random.default_rng(2)
    long = [-random.random(20), -random.random(20)]
    one = graded_responses(long, long, [0, 1])
    other = graded_responses([long[0][:7], long[1]], [long[0][:7], long[1]], [0, 1])
    for name, z in ABSTRACTIONS.items():
        assert np.array_equal(z(one)[0, :7], z(other)[0, :7]), name


def test_large_weights_neither_overflow_nor_hide() -> None:
    logged = graded_responses([np.full(900, -0.1)] * 3, [np.full(900, -k) for k in (3.0, 2.0, 1.9)], [1, 0, 0])
    assert effective_responses(logged.log_weights) == pytest.approx(1)
    for name in ("is", "pdis"):
        assert ALL[name](logged) == pytest.approx(1), name
    assert math.isfinite(doubly_robust(logged)) and math.isfinite(geometric(logged))
    unlikely = graded_responses([np.full(900, -k) for k in (3.0, 2.0, 1.9)], [np.full(900, -0.1)] * 3, [1, 0, 0])
    assert effective_responses(unlikely.log_weights) == pytest.approx(1), "all tiny is not all equal"


def test_weights_are_normalized() -> None:
    assert normalized(np.log([1.0, 3.0])) == pytest.approx([0.25, 0.75])
    assert [too_few(*counts) for counts in ((1, 2), (1, 3), (0, 0), (1, 1))] == [False, True, True, False]
    weights = {(1, 1): True, (1, 1e-9): False, (1, 1, 1e-9): True, (0.4, 0.4, 0.4): False, (0.6, 0.6): True}
    for found, tells in weights.items():
        assert usable(np.log(found)) is tells, found
    assert not usable(np.full(8, -900.0)), "all alike, and all unlikely"


def test_a_response_without_tokens_is_sure() -> None:
    logged = graded_responses([np.array([]), np.array([-1.0])], [np.array([]), np.array([-2.0])], [1, 0])
    assert np.exp(logged.log_weights) == pytest.approx([1, math.e])
    assert importance_sampling(logged) == pytest.approx(1 / (1 + math.e))


def test_what_is_no_trajectory_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        graded_responses([np.array([-np.inf])], [np.array([-1.0])], [1])
    with pytest.raises(ValueError, match="first token"):
        Trajectories(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2), bool), np.zeros((1, 2)))


def test_the_bootstrap_covers() -> None:
    random = np.random.default_rng(0)
    covered = [
        found.low <= 0.4 <= found.high
        for seed in range(200)
        for found in [mean_over_problems((random.random(60) < 0.4) * 1.0, seed, resamples=400)]
    ]
    assert 0.9 <= np.mean(covered) <= 0.99
    found = mean_over_problems(np.array([0.0, 1.0, 0.5, 0.5]))
    assert found.value == 0.5 and 0 < found.low < 0.5 < found.high < 1
    assert mean_over_problems(np.full(9, 0.3)).low == pytest.approx(0.3)
    assert math.isnan(mean_over_problems(np.array([0.1, np.nan])).value)


# -- broken formulas -------------------------------------------------------------------------------------------


def test_mutations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these wrong formulas fails one of the tests above."""
    checks = (
        test_by_hand,
        lambda: test_star_by_time_is_per_decision(1.0),
        test_one_state_is_a_geometric_series,
        test_large_weights_neither_overflow_nor_hide,
    )
    wrong = {
        "weights of single tokens": ("last_log_ratios", lambda t, last=0: t.log_ratios),
        "weights of all tokens at each": (
            "last_log_ratios",
            lambda t, last=0: t.log_weights[:, None] + t.log_ratios * 0,
        ),
        "reversed ratios": ("log_weights", property(lambda t: -t.log_ratios.sum(1))),
        "mean ratios": ("log_weights", property(lambda t: t.log_ratios.mean(1))),
    }
    for name, (attribute, mutant) in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(Trajectories, attribute, mutant)
            assert fails(checks), name
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "normalized", lambda log: np.exp(log) / len(log))
        assert fails(checks), "not normalized"
    with monkeypatch.context() as patch:
        patch.setattr(np.linalg, "solve", lambda m, r: m @ r)
        assert fails(checks), "no inverse"


def fails(checks) -> bool:  # type: ignore[no-untyped-def]
    for check in checks:
        try:
            check()
        except AssertionError:
            return True
    return False
