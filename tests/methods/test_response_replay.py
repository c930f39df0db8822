"""ARPO, RePO and the store of single responses from which both replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import exp
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response
from helpers.tiny_models import TASK, fit

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.methods.arpo import ARPO
from popo_lightning.methods.repo import RETRIEVALS, RePO
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.aggregations import SequenceMean
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.replay.composer import Composer
from popo_lightning.replay.response_store import ResponseStore
from popo_lightning.toys.countdown import CountdownSteps

WRONG = (0.0, 0.0, 0.0, 0.0)


def reread(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def marked(id: int, version: int, problem: str, scores: tuple[float, ...] = WRONG) -> Group:
    """Returns a group whose responses are identified by their first token, 100 * version + place."""
    made = group(id, version, problem, scores)
    responses = [replace(r, token_ids=torch.tensor([100 * version + i, 1])) for i, r in enumerate(made.responses)]
    return replace(made, responses=responses)


def marks(responses: list[Response]) -> list[int]:
    return [int(each.token_ids[0]) for each in responses]


def compose(composer: Composer, version: int, *fresh: Group) -> list[Group]:
    return composer.compose(iteration(version, fresh))


# -- store ---------------------------------------------------------------------------------------------------------


def test_store_keeps_the_newest_of_each_problem_with_their_versions() -> None:
    store = ResponseStore(3)
    first, second, other = marked(0, 4, "a"), marked(1, 5, "a"), marked(2, 5, "b")
    store.insert(first, first.responses[:2])
    store.insert(second, second.responses[:2])
    store.insert(other, other.responses[3:])
    store.insert(marked(3, 6, "c"), [])
    assert marks(store.of("a")) == [401, 500, 501]
    assert [each.version for each in store.of("a")] == [4, 5, 5]
    assert marks(store.of("b")) == [503]
    assert store.of("c") == []
    assert store.report() == {"replay/stored_problems": 2, "replay/stored_responses": 4}


def test_store_survives_a_checkpoint_and_obeys_the_present_capacity(tmp_path: Path) -> None:
    store = ResponseStore(3)
    kept = replace(response((7, 8), (-0.25, -1.5), 0.5, 1.0, "length", "timeout"))
    store.insert(group(0, 9, "a"), [response(), response((5,)), kept])
    read = ResponseStore(2)
    read.load_state_dict(reread(store.state_dict(), tmp_path))
    first, second = read.of("a")
    assert first.token_ids.tolist() == [5]
    assert second.token_ids.tolist() == [7, 8] and second.behave_logp.tolist() == [-0.25, -1.5]
    assert (second.parts, second.finish_reason, second.failure) == ({"score": 0.5, "acc": 1.0}, "length", "timeout")
    assert second.version == 9
    read.insert(group(1, 10, "a"), [response((6,))])
    assert [each.token_ids.tolist() for each in read.of("a")] == [[7, 8], [6]]


# -- ARPO ----------------------------------------------------------------------------------------------------------


def test_a_failed_group_gets_a_stored_success_of_its_own_problem() -> None:
    composer = ARPO()
    fresh = [marked(0, 0, "a", (0, 0, 1, 0)), marked(1, 0, "b")]
    assert compose(composer, 0, *fresh) == fresh
    failed, hopeless = marked(2, 1, "a"), marked(3, 1, "b")
    helped, left = compose(composer, 1, failed, hopeless)
    assert left is hopeless
    assert marks(helped.responses) == [2, 101, 102, 103]
    assert [each.version for each in helped.responses] == [0, None, None, None]
    assert (helped.id, helped.version, helped.advantages, helped.loss_weight) == (2, 1, None, 1.0)
    # The rewards 1 0 0 0 have mean 0.25 and unbiased std 0.5, so (1 - 0.25) / 0.5 and -0.25 / 0.5.
    assert GroupNormalized(eps=0.0).for_group(helped, "score") == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert [row.fresh for row in Minibatch([helped], 1, 0).rows()] == [False, True, True, True]
    assert [row.age for row in Minibatch([helped], 1, 0).rows()] == [1, 0, 0, 0]
    assert composer.report()["replay/injected_responses"] == 1


@pytest.mark.parametrize(
    ("scores", "helped"),
    [
        ((0.1, 0.1, 0.1, 0.1), True),
        ((0.19, 0.19, 0.19, 0.19), True),
        ((0.21, 0.21, 0.21, 0.21), False),  # equal, but not low
        ((1.0, 1.0, 1.0, 1.0), False),
        ((0.0, 0.0, 0.0, 0.3), False),  # low, but not equal: std 0.13
        ((0.0, 0.0, 0.09, 0.09), True),  # population std 0.045, unbiased 0.052
        ((0.0, 0.0, 0.11, 0.11), False),  # population std 0.055
    ],
)
def test_which_groups_have_failed(scores: tuple[float, ...], helped: bool) -> None:
    """All scores are 0, so the accuracies decide."""
    composer = ARPO()
    compose(composer, 0, marked(0, 0, "a", (1, 0, 0, 0)))
    failing = [
        replace(r, parts={"score": 0.0, "acc": s}) for r, s in zip(marked(1, 1, "a").responses, scores, strict=True)
    ]
    (found,) = compose(composer, 1, replace(marked(1, 1, "a"), responses=failing))
    assert (marks(found.responses)[0] == 0) is helped


def test_eight_failures_of_full_format_have_failed() -> None:
    """As in the authors' code, training uses success + 0.5 * format, and only success decides what has failed."""
    composer = ARPO()
    compose(composer, 0, marked(0, 0, "a", (1, 0, 0, 0)))
    failing = [replace(r, parts={"score": 0.5, "acc": 0.0}) for r in marked(1, 1, "a", (0.5,) * 8).responses]
    (found,) = compose(composer, 1, replace(marked(1, 1, "a"), responses=failing))
    assert marks(found.responses) == [0, *range(101, 108)]


def test_an_iterations_own_successes_do_not_fill_its_failures() -> None:
    composer = ARPO()
    solved, failed = marked(0, 3, "a", (1, 1, 0, 0)), marked(1, 3, "a")
    assert compose(composer, 3, solved, failed)[1] is failed
    assert marks(composer.store.of("a")) == [300, 301]


def test_successes_are_the_accurate_ones_whose_grading_did_not_fail_and_the_newest_stay() -> None:
    composer = ARPO(capacity=2, success_above=0.6)
    accs, scores = (0.6, 0.7, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0)
    graded = group(0, 0, "a", scores, accs)
    failing = replace(graded.responses[3], failure="timeout")
    compose(composer, 0, replace(graded, responses=[*graded.responses[:3], failing]))
    assert [each.parts["acc"] for each in composer.store.of("a")] == pytest.approx([0.7, 1.0])
    compose(composer, 1, marked(1, 1, "a", (1, 0, 0, 0)))
    assert [each.version for each in composer.store.of("a")] == [0, 1]


def test_the_success_is_drawn_at_random_and_by_the_iterations_seed() -> None:
    composer = ARPO()
    compose(composer, 0, marked(0, 0, "a", (1, 1, 1, 0)))
    found = [marks(compose(composer, v, marked(v, v, "a"))[0].responses)[0] for v in range(1, 40)]
    again = [marks(compose(composer, v, marked(v, v, "a"))[0].responses)[0] for v in range(1, 40)]
    assert found == again and set(found) == {0, 1, 2}


def test_arpo_resumes_exactly(tmp_path: Path) -> None:
    straight, first = ARPO(), ARPO()
    for version in range(3):
        for composer in (straight, first):
            compose(composer, version, marked(version, version, "a", (1, 0, 1, 0)), marked(9, version, "b"))
    resumed = ARPO()
    resumed.load_state_dict(reread(first.state_dict(), tmp_path))
    for version in range(3, 9):
        fresh = [marked(version, version, "a"), marked(10, version, "b", (0, 1, 0, 0))]
        left, right = (compose(composer, version, *fresh) for composer in (straight, resumed))
        assert [marks(each.responses) for each in left] == [marks(each.responses) for each in right]


def test_arpo_refuses() -> None:
    for settings in ({"capacity": 0}, {"low_std": 0.0}, {"low_mean": float("nan")}):
        with pytest.raises(SettingError, match=f"ARPO.{next(iter(settings))} is"):
            ARPO(**settings)  # type: ignore[arg-type]


# -- RePO ----------------------------------------------------------------------------------------------------------


def small(**settings: Any) -> RePO:
    return RePO(**({"capacity": 6, "start": 4, "replays": 3} | settings))


def stocked(composer: RePO, *scores: float) -> RePO:
    """Stores responses of problem "a" with these rewards, one per version, with marks 0, 100, 200..."""
    for version, score in enumerate(scores):
        made = marked(version, version, "a", (score, 0.0))
        composer.store.insert(made, made.responses[:1])
    return composer


def test_replay_begins_when_enough_is_stored_and_before_the_fresh_are() -> None:
    composer = small()
    pair = (0.0, 1.0)
    assert ids(compose(composer, 0, marked(0, 0, "a", pair))) == [0]
    assert ids(compose(composer, 1, marked(1, 1, "a", pair), marked(2, 1, "b", pair))) == [1, 2]  # 2 stored of each
    fresh_a, fresh_b = marked(3, 2, "a", pair), marked(4, 2, "b", pair)
    first, replayed, other = compose(composer, 2, fresh_a, fresh_b)  # 4 of a, 2 of b
    assert first is fresh_a and other is fresh_b
    assert marks(replayed.responses) == [1, 100, 101]  # the three most recent
    assert [each.version for each in replayed.responses] == [0, 1, 1]
    assert (replayed.id, replayed.version, replayed.problem.id) == (-4, 0, "a")
    assert torch.equal(replayed.prompt_ids, fresh_a.prompt_ids)
    assert [row.age for row in Minibatch([replayed], 2, 0).rows()] == [2, 1, 1]
    assert composer.report()["replay/replayed_responses"] == 3
    assert composer.passes_before_replay(2) == 2 and composer.passes_before_replay(3) == 2
    assert RePO().passes_before_replay(8) == 2 and RePO().passes_before_replay(4) == 4


def test_what_each_retrieval_takes() -> None:
    scores = (0.5, 1.0, 0.0, 1.0, 0.25, 0.0)  # marks 0, 100, ..., 500
    fresh = marked(9, 9, "a", (0.0, 1.0))
    found = {}
    for retrieval in RETRIEVALS:
        replayed = compose(stocked(small(retrieval=retrieval), *scores), 9, fresh)[1]
        found[retrieval] = sorted(marks(replayed.responses))
    assert found["recent"] == [300, 400, 500]
    assert found["reward"] == [0, 100, 300]  # 1, 1, 0.5
    assert found["all"] == [0, 100, 200, 300, 400, 500]
    # 1 1 0 and 1 0 0 both have variance 2/9. The first has the greater sum.
    assert sorted(scores[mark // 100] for mark in found["variance"]) == [0.0, 1.0, 1.0]
    assert len(set(found["random"])) == 3


def test_of_equally_rewarded_the_newest_is_the_best() -> None:
    composer = stocked(small(retrieval="reward", replays=2), 1.0, 1.0, 1.0, 0.0)
    assert marks(compose(composer, 9, marked(9, 9, "a", (0.0, 1.0)))[1].responses) == [100, 200]


def test_variance_is_that_of_the_best_of_all_subsets() -> None:
    random = Random(0)
    for _ in range(60):
        scores = [random.choice((0.0, 0.1, 0.5, 1.0)) for _ in range(6)]
        composer = stocked(small(retrieval="variance"), *scores)
        chosen = compose(composer, 9, marked(9, 9, "a", (0.0, 1.0)))[1].rewards().double()
        subsets = [torch.tensor(each, dtype=torch.float64) for each in combinations(scores, 3)]
        best = max(float(each.var(correction=0)) for each in subsets)
        assert float(chosen.var(correction=0)) == pytest.approx(best, abs=1e-7)
        sums = [float(each.sum()) for each in subsets if abs(float(each.var(correction=0)) - best) < 1e-9]
        assert float(chosen.sum()) == pytest.approx(max(sums), abs=1e-6)


def test_random_retrieval_follows_the_iterations_seed_and_varies() -> None:
    composer = stocked(small(retrieval="random", capacity=6), *([0.0] * 6))
    before = composer.state_dict()
    found = []
    for version in (10, 10, 11, 12, 13):
        composer.load_state_dict(before)
        found.append(marks(compose(composer, version, marked(9, version, "a", (0.0, 1.0)))[1].responses))
    assert found[0] == found[1]
    assert len({tuple(each) for each in found}) > 1


def test_split_and_mixed_advantages_by_hand() -> None:
    fresh = marked(9, 9, "a", (0.0, 1.0))
    rule = GroupNormalized(normalize_by_std=False)
    on, off = compose(stocked(small(coefficient=0.5), 0.0, 1.0, 1.0, 1.0, 0.0, 1.0), 9, fresh)
    assert (on.loss_weight, off.loss_weight) == (1.0, 0.5)
    assert rule.for_group(on, "score") == pytest.approx([-0.5, 0.5])
    assert rule.for_group(off, "score") == pytest.approx([1 / 3, -2 / 3, 1 / 3])  # of 1 0 1
    (both,) = compose(stocked(small(advantages="mixed"), 0.0, 1.0, 1.0, 1.0, 0.0, 1.0), 9, fresh)
    assert marks(both.responses) == [900, 901, 300, 400, 500]
    assert rule.for_group(both, "score") == pytest.approx([-0.6, 0.4, 0.4, -0.6, 0.4])  # of 0 1 1 0 1
    assert (both.id, both.version, both.loss_weight) == (9, 9, 1.0)
    assert [row.age for row in Minibatch([both], 9, 0).rows()] == [0, 0, 6, 5, 4]


def test_the_loss_is_that_of_both_sources_by_hand() -> None:
    """Rows have 2 tokens, with behave -0.5. The policy has moved to -0.1 on replayed rows and not on fresh ones."""
    composer = stocked(small(coefficient=0.5, replays=2), 0.0, 0.0, 1.0, 0.0)
    groups = compose(composer, 9, marked(9, 9, "a", (0.0, 1.0)))
    minibatch = Minibatch(groups, 9, 0)
    rule = GroupNormalized(normalize_by_std=False)
    rows = pad_rows(minibatch.rows(advantages=[a for each in groups for a in rule.for_group(each, "score")]))
    now = torch.where(rows.fresh[:, None], -0.5, -0.1).expand(4, 2)
    inputs = rows.inputs(now)
    objective = Objective(NoCorrection(), BehaveAligned(0.2, 0.2, None), aggregation=SequenceMean())
    loss, _ = objective(inputs, objective.aggregation.size(torch.tensor([2, 2, 2, 2])))
    # Fresh: A = -0.5, 0.5 at ratio 1, which cancel. Replayed: A = 0.5 at 1.2, since e^0.4 is clipped, and -0.5 at
    # e^0.4.
    assert float(loss) == pytest.approx(0.5 * (-0.5 * 1.2 + 0.5 * exp(0.4)) / 4)


def test_repo_resumes_exactly(tmp_path: Path) -> None:
    straight, first = small(retrieval="random"), small(retrieval="random")
    for version in range(4):
        for composer in (straight, first):
            compose(composer, version, marked(version, version, "a", (0, 1)), marked(9, version, "b", (1, 0)))
    resumed = small(retrieval="random")
    resumed.load_state_dict(reread(first.state_dict(), tmp_path))
    for version in range(4, 9):
        fresh = [marked(version, version, "a", (0, 1)), marked(10, version, "b", (0, 1))]
        left, right = (compose(composer, version, *fresh) for composer in (straight, resumed))
        assert len(left) == 4
        assert [marks(each.responses) for each in left] == [marks(each.responses) for each in right]
        assert [each.version for each in left] == [each.version for each in right]


def test_repo_refuses() -> None:
    for settings, named in (
        ({"start": 17}, "start is 17"),
        ({"start": 1}, "start is 1"),
        ({"replays": 1}, "replays is 1"),
        ({"replays": 17}, "replays is 17"),
        ({"retrieval": "newest"}, "retrieval is 'newest'"),
        ({"advantages": "joint"}, "advantages is 'joint'"),
        ({"coefficient": 0.0}, "coefficient is 0.0"),
        ({"coefficient": 0.5, "advantages": "mixed"}, "coefficient is 0.5, but mixed"),
    ):
        with pytest.raises(SettingError, match=f"RePO.{named}"):
            RePO(**settings)  # type: ignore[arg-type]


# -- in a run ------------------------------------------------------------------------------------------------------


class FewProblems(CountdownSteps):
    """Has so few problems that each iteration asks all of them."""

    def train_problems(self) -> Sequence[Problem]:
        return super().train_problems()[:10]


def test_both_train(policy: Path, tmp_path: Path) -> None:
    """In real iterations problems return, and mixed groups pass through the whole policy."""
    aligned = Objective(NoCorrection(), BehaveAligned(0.2, 0.2, None), aggregation=SequenceMean())
    for name, composer, objective in (
        ("arpo", ARPO(low_mean=0.5), Objective(NoCorrection())),
        ("split", RePO(4, 4, 4), aligned),
        ("mixed", RePO(4, 4, 4, advantages="mixed"), aligned),
    ):
        task = FewProblems(**TASK)
        run = fit(policy, tmp_path / name, composer=composer, objective=objective, task=task, iterations=4, lr=3e-4)
        report = composer.report()
        assert report["replay/stored_problems"] <= 10
        assert sum(row["train/grad_norm"] for row in run.rows) > 0
        if isinstance(composer, RePO):
            assert report["replay/replayed_responses"] == 40 == report["replay/stored_responses"]
        else:
            assert report["replay/stored_responses"] > 0
