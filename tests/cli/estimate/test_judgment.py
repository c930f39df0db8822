"""Judgment of a policy: intervals that hold, changes by problem, and no estimate if too few problems are usable."""

from __future__ import annotations

import numpy as np
import pytest

from popo_lightning.cli.estimate import judgment
from popo_lightning.cli.estimate.estimators import importance_sampling
from popo_lightning.cli.estimate.judgment import IMPORTANCE, Choices, judged, named_estimators
from popo_lightning.cli.estimate.names import LARGEST_WEIGHT
from popo_lightning.cli.estimate.trajectories import Trajectories, graded_responses


def problems(shift: float, seed: int, center: float = 0.0) -> tuple[list[Trajectories], float]:
    """Returns problems of two steps, both to be right, and the truth. The target is better by ``shift`` log-odds."""
    random = np.random.default_rng(seed)
    logged, truth = [], []
    for odds in random.normal(center, 1, 60):
        sampled, target = (1 / (1 + np.exp(-(odds + by))) for by in (0.0, shift))
        right = random.random((8, 2)) < sampled
        logp = [np.log(np.where(right, p, 1 - p)) for p in (target, sampled)]
        logged.append(graded_responses(list(logp[0]), list(logp[1]), right.all(1).astype(float)))
        truth.append(target**2)
    return logged, float(np.mean(truth))


def test_intervals_hold() -> None:
    """Tests 50 sets of problems. The bias of importance sampling at 8 responses is far below the interval's width."""
    inside = dict.fromkeys(named_estimators(Choices()), 0)
    errors = {name: [] for name in inside} | {"as sampled": []}  # type: ignore[var-annotated]
    for seed in range(50):
        logged, truth = problems(0.3, seed)
        found = judged(logged, Choices(seed=seed))
        errors["as sampled"].append(found.sampled.value - truth)
        for name, value in found.estimates.items():
            inside[name] += value.low <= truth <= value.high
            errors[name].append(value.value - truth)
    for name in inside:
        if "biased" not in name:
            assert inside[name] >= 44, (name, inside)
            assert abs(np.mean(errors[name])) < 0.012, (name, np.mean(errors[name]))
    assert np.mean(errors["as sampled"]) < -0.06, "else there is nothing to correct"
    assert abs(np.mean(errors["doubly robust"])) < 0.006, "which has no bias"
    assert np.mean(errors["geometric (biased)"]) < np.mean(errors[IMPORTANCE]) - 0.005


def test_by_hand() -> None:
    """There are two problems of two responses, with weights 3 and 1, and 1 and 1."""
    one = graded_responses([np.log([0.75]), np.log([0.5])], [np.log([0.25]), np.log([0.5])], [1, 0])
    two = graded_responses([np.log([0.5])] * 2, [np.log([0.5])] * 2, [1, 0])
    found = judged([one, two])
    assert list(found.effective) == pytest.approx([16 / 10, 2]) and not found.refused and found.share_unusable == 0.5
    assert (found.problems, found.responses, found.mean_weight) == (2, 4, pytest.approx(1.5))
    assert found.sampled.value == 0.5
    assert found.estimates[IMPORTANCE].value == pytest.approx((0.75 + 0.5) / 2)
    assert found.changes[IMPORTANCE].value == pytest.approx(0.125)
    assert (found.changes[IMPORTANCE].low, found.changes[IMPORTANCE].high) == pytest.approx((0, 0.25))
    assert list(found.estimates) == list(named_estimators(Choices()))
    assert f"clipped at {LARGEST_WEIGHT:g} (biased)" in found.estimates


def test_effective_responses_fall_with_the_distance_until_nothing_is_said() -> None:
    found = [judged(problems(shift, 0, center=-2)[0]) for shift in (0.0, 0.5, 1.0, 3.0, 9.0)]
    means = [each.effective.mean() for each in found]
    assert means[:3] == sorted(means[:3], reverse=True)
    assert found[0].effective == pytest.approx(np.full(60, 8.0))
    assert [each.refused for each in found][:2] == [False, False] and found[-1].refused
    for each in found:
        assert each.refused == (not each.estimates) == (not each.changes)
    assert means[-1] > 2, "effective responses alone would not have said so: all are alike, and all unlikely"
    with pytest.raises(ValueError, match="at least one problem"):
        judged([])


def test_mutations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(logged: Trajectories) -> float:
        return importance_sampling(
            Trajectories(logged.log_ratios * 0.5, logged.rewards, logged.alive, logged.target_logp)
        )

    for name, value in {"importance_sampling": mutant, "doubly_robust": mutant}.items():
        with monkeypatch.context() as patch:
            patch.setattr(judgment.estimators, name, value)
            with pytest.raises(AssertionError):
                test_intervals_hold()
                pytest.fail(name)
    with monkeypatch.context() as patch:
        patch.setattr(judgment, "too_few", lambda usable, problems: False)
        with pytest.raises(AssertionError):
            test_effective_responses_fall_with_the_distance_until_nothing_is_said()
            pytest.fail("never refuses")
