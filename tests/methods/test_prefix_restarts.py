"""Rollouts that restart inside earlier responses: stored prefixes, trees, and the engines' continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response
from helpers.tiny_models import attached, fit, tiny_task
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.grading.pool import GradingPool
from popo_lightning.methods.rr import PrefixRestarts, StoredPrefix
from popo_lightning.methods.tree_opo import PrefixTree, TreeBaseline
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.policy import PolicyModule
from popo_lightning.replay.composer import Iteration
from popo_lightning.replay.prefixes import cut_response
from popo_lightning.rollout.generation import RolloutGenerator

WRONG = (0.0, 0.0)
HALF: dict[str, Any] = {"cut": (0.5, 0.5)}


def asked(problem: str, version: int, scores: Sequence[float] = WRONG, id: int = 0) -> Group:
    """Returns a group of responses of four tokens. The first token identifies each: 100 * version + place."""
    made = group(id, version, problem, scores)
    answers = [
        replace(response((100 * version + i, 6, 7, 1), score=score), version=None) for i, score in enumerate(scores)
    ]
    return replace(made, responses=answers)


class Restarts:
    """Samples given problems, records its calls, and gives each group its given rewards."""

    def __init__(self, **rewards: Sequence[float]) -> None:
        self.rewards = rewards
        self.asked: list[tuple[str, list[int], int]] = []

    def __call__(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None) -> list[Group]:
        assert prefixes is not None
        found = []
        for problem, prefix in zip(problems, prefixes, strict=True):
            self.asked.append((problem.id, prefix.tolist(), n))
            made = group(1000 + len(self.asked), 0, problem.id, self.rewards.get(problem.id, [0.0] * n))
            found.append(replace(made, problem=problem, prefix_tokens=len(prefix)))
        return found


def at(version: int, fresh: Sequence[Group], restarts: Restarts, num_problems: int = 4, **changes: Any) -> Iteration:
    return iteration(version, fresh, given_problems=restarts, num_problems=num_problems, **changes)


# -- cuts ----------------------------------------------------------------------------------------------------------


def test_a_cut_is_a_share_and_never_the_whole() -> None:
    ten = response(range(10))
    assert cut_response(ten, (0.5, 0.5), Random(0)).tolist() == [0, 1, 2, 3, 4]
    assert cut_response(ten, (1.0, 1.0), Random(0)).tolist() == list(range(9))
    assert cut_response(ten, (0.0, 0.0), Random(0)).tolist() == [0]
    assert cut_response(response((3, 1)), (0.9, 0.9), Random(0)).tolist() == [3]
    assert cut_response(response((1,)), (0.5, 0.5), Random(0)).tolist() == []
    lengths = {len(cut_response(ten, (0.25, 0.75), Random(seed))) for seed in range(99)}
    assert lengths == {2, 3, 4, 5, 6, 7}
    assert cut_response(ten, (0.5, 0.5), Random(0)).untyped_storage().nbytes() == 5 * 8  # stores only the prefix


# -- RR ------------------------------------------------------------------------------------------------------------


def test_unsolved_problems_are_asked_again_from_a_prefix() -> None:
    composer, restarts = PrefixRestarts(share=0.5, **HALF), Restarts()
    fresh = [asked("a", 0), asked("b", 0, (0.0, 1.0)), asked("c", 0), asked("d", 0)]
    assert composer.compose(at(0, fresh, restarts)) == fresh
    assert restarts.asked == []
    fresh = [asked("e", 1, (1.0, 1.0), 8), asked("f", 1, (1.0, 1.0), 9)]
    found = composer.compose(at(1, fresh, restarts))  # of 4 problems, 2 are restarts and 2 from the sampler
    assert ids(found) == [8, 9, 1001, 1002]
    assert [(problem, n, len(prefix)) for problem, prefix, n in restarts.asked] == [("a", 2, 2), ("c", 2, 2)]
    assert all(prefix[1] == 6 and prefix[0] in (0, 1) for _, prefix, _ in restarts.asked)
    assert composer.report() == {
        "replay/stored_prefixes": 3,
        "replay/restarted_groups": 2,
        "replay/restart_success": 0,
        "replay/prefix_tokens": 2,
    }


def test_the_best_of_the_failed_is_cut() -> None:
    composer = PrefixRestarts(**HALF)
    for version in range(8):  # a failed response may have a partial reward
        composer._stored.clear()
        composer._asked(asked("a", version, (0.0, 0.1, 0.05)), Random(version))
        assert composer._stored["a"].tokens.tolist() == [100 * version + 1, 6]
    firsts = set()
    for seed in range(20):
        composer._stored.clear()
        composer._asked(asked("a", 0, (0.1, 0.0, 0.1)), Random(seed))
        firsts.add(int(composer._stored["a"].tokens[0]))
    assert firsts == {0, 2}
    short = replace(asked("s", 0), responses=[response((1,), score=0.1), response((8, 1))])
    composer._asked(short, Random(0))
    assert composer._stored["s"].tokens.tolist() == [8]  # the better response has no prefix
    composer._asked(replace(short, problem=Problem("t", "", None), responses=[response((1,))] * 2), Random(0))
    assert "t" not in composer._stored


def test_values_by_hand_and_the_best_go_first() -> None:
    composer = PrefixRestarts(share=0.25, prior=(1.0, 3.0), min_value=0.0)
    problem = Problem("p", "", None)
    assert composer.value(StoredPrefix(problem, torch.tensor([1]), 0)) == 0.25
    assert composer.value(StoredPrefix(problem, torch.tensor([1]), 0, 4, 1)) == 2 / 8
    for name, version, tries, successes in (("a", 0, 4, 2), ("b", 3, 4, 1), ("c", 5, 0, 0), ("d", 4, 8, 0)):
        asked_before = Problem(name, "", None)
        composer._stored[name] = StoredPrefix(asked_before, torch.tensor([1]), version, tries, successes)
    assert sorted(composer._stored, key=composer._rank) == ["a", "c", "b", "d"]  # 3/8, then 2/8 twice, 1/12
    restarts = Restarts()
    composer.compose(at(6, [asked(str(i), 6, (1.0, 1.0)) for i in range(3)], restarts))
    assert [problem for problem, _, _ in restarts.asked] == ["a"]


def test_restarts_are_counted_and_prefixes_retire() -> None:
    composer = PrefixRestarts(share=0.5, min_value=0.2, **HALF)
    composer.compose(at(0, [asked(name, 0) for name in "abcd"], Restarts()))
    solved = [asked(name, 1, (1.0, 1.0)) for name in "xy"]
    kept = dict(composer._stored)
    composer.compose(at(1, solved, Restarts(a=(1.0, 0.0), b=(1.0, 1.0))))
    assert sorted(composer._stored) == ["a", "c", "d"]  # every restart of b succeeded
    assert (kept["a"].tries, kept["a"].successes) == (2, 1)
    # a, c and d have value 1/2 each. Of those of version 0 all are asked, in order of insertion.
    composer.compose(at(2, solved, Restarts(a=(0.0, 0.0), c=(0.0, 0.0))))
    assert (kept["a"].tries, kept["a"].successes) == (4, 1)  # 2/6
    assert composer.value(kept["c"]) == 1 / 4
    fresh = [asked("a", 3, (0.0, 1.0)), asked("x", 3, (1.0, 1.0))]
    composer.compose(at(3, fresh, Restarts(d=(1.0, 0.0), a=(0.0, 0.0))))
    assert sorted(composer._stored) == ["c", "d"]  # a was solved from its prompt
    composer.compose(at(4, solved, Restarts(d=(1.0, 0.0), c=(0.0, 0.0))))
    assert sorted(composer._stored) == ["d"]  # c: 1/6 < 0.2


def test_a_problem_that_fails_again_gives_a_new_prefix_unless_the_old_one_is_promising() -> None:
    composer = PrefixRestarts(**HALF)
    composer._asked(asked("a", 0), Random(0))
    composer._asked(asked("a", 1), Random(0))
    assert int(composer._stored["a"].tokens[0]) >= 100  # untried, so the newer one stays
    composer._stored["a"].tries, composer._stored["a"].successes = 4, 3
    composer._asked(asked("a", 2), Random(0))
    assert composer._stored["a"].version == 1
    composer._stored["a"].successes = 1
    composer._asked(asked("a", 3), Random(0))
    assert composer._stored["a"].version == 3 and composer._stored["a"].tries == 0


def test_capacity_and_the_end() -> None:
    composer, restarts = PrefixRestarts(capacity=2, stop_at=2, share=0.25, **HALF), Restarts()
    composer.compose(at(0, [asked(name, 0) for name in "abcd"], restarts))
    assert sorted(composer._stored) == ["a", "b"]
    composer.compose(at(1, [asked(name, 1) for name in "efg"], restarts))
    assert len(restarts.asked) == 1
    assert sorted(composer._stored) == ["e", "f"]  # these are newer, and a has failed again
    fresh = [asked(name, 2) for name in "hijk"]
    assert composer.compose(at(2, fresh, restarts)) == fresh
    assert len(restarts.asked) == 1 and composer._stored == {}
    endless = PrefixRestarts(stop_at=None, share=0.25)
    endless.compose(at(900, fresh, restarts))
    endless.compose(at(901, fresh[:3], restarts))
    assert len(restarts.asked) == 2


def test_the_share_leaves_room_for_new_problems() -> None:
    for problems, share, restarted in ((4, 0.01, 1), (4, 0.99, 3), (6, 0.25, 2), (2, 0.5, 1)):
        composer, restarts = PrefixRestarts(share=share), Restarts()
        fresh = [asked(str(i), 0) for i in range(problems)]
        composer.compose(at(0, fresh, restarts, problems))
        found = composer.compose(at(1, fresh[: problems - restarted], restarts, problems))
        assert len(restarts.asked) == restarted and len(found) == problems
    with pytest.raises(SettingError, match="samples 1 problem"):
        PrefixRestarts().compose(at(0, [asked("a", 0)], Restarts(), num_problems=1))


def test_restarts_resume_exactly(tmp_path: Path) -> None:
    def play(composer: PrefixRestarts, version: int) -> tuple[list[Any], list[int]]:
        restarts = Restarts(**{name: (float(version % 3 == 0), 0.0) for name in "abcdef"})
        count = len(composer._stored) and min(2, len(composer._stored))
        names = "abcdefghij"[version % 4 :][: 4 - count]
        found = composer.compose(at(version, [asked(name, version) for name in names], restarts))
        return restarts.asked, ids(found)

    straight, first = PrefixRestarts(share=0.5), PrefixRestarts(share=0.5)
    for version in range(5):
        play(straight, version)
        play(first, version)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = PrefixRestarts(share=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed._stored["a"].problem == first._stored["a"].problem
    for version in range(5, 14):
        left, right = play(straight, version), play(resumed, version)
        assert left == right and left[0]


def test_rr_and_tree_refuse() -> None:
    for settings, named in (
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"stop_at": 0}, "stop_at is 0"),
        ({"cut": (0.6, 0.5)}, r"cut is \[0.6, 0.5\]"),
        ({"cut": (0.5, 1.5)}, r"cut is \[0.5, 1.5\]"),
        ({"capacity": 0}, "capacity is 0"),
        ({"prior": (0.0, 1.0)}, r"prior is \[0.0, 1.0\]"),
        ({"min_value": 0.6}, "min_value is 0.6"),
    ):
        with pytest.raises(SettingError, match=f"PrefixRestarts.{named}"):
            PrefixRestarts(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"PrefixTree\.cut"):
        PrefixTree((0.5, 0.4))
    with pytest.raises(SettingError, match=r"data\.group_size is 3"):
        PrefixTree().compose(at(0, [asked("a", 0, (0.0, 0.0, 1.0))], Restarts()))


# -- tree ----------------------------------------------------------------------------------------------------------


def test_half_of_each_group_restarts_inside_the_other_half() -> None:
    restarts = Restarts(a=(1.0, 1.0), b=(0.0, 1.0))
    parents = [asked("a", 0, (0.0, 0.0, 0.0), 1), asked("b", 0, (0.0, 1.0, 0.0), 2)]
    sizes: list[tuple[int, int]] = []

    def next_problems(count: int, n: int) -> list[Group]:
        sizes.append((count, n))
        return parents

    made = at(0, parents, restarts, num_problems=2, group_size=5, next_problems=next_problems)
    found = PrefixTree(**HALF).compose(made)
    assert sizes == [(2, 3)]
    assert [(problem, n) for problem, _, n in restarts.asked] == [("a", 2), ("b", 2)]
    assert all(prefix[0] in (0, 1, 2) and prefix[1:] == [6] for _, prefix, _ in restarts.asked)
    assert ids(found) == [1, 2, 1001, 1002]
    assert [each.subtree_rewards.tolist() for each in found[:2] if each.subtree_rewards is not None] == [[1, 1], [0, 1]]
    assert [each.subtree_rewards for each in found[2:]] == [None, None]
    # Subtree of a: 0 0 0 1 1, mean 0.4; of b: 0 1 0 0 1. b's child has 0 1, mean 0.5. All of a's child's responses are
    # right.
    worth = [[round(float(a), 6) for a in TreeBaseline("mean").for_group(each, "score")] for each in found]
    assert worth == [[-0.4, -0.4, -0.4], [-0.4, 0.6, -0.4], [0, 0], [-0.5, 0.5]]


def test_the_cut_response_is_drawn_by_the_iterations_seed() -> None:
    found = []
    for version in (0, 0, *range(1, 12)):
        restarts = Restarts()
        parent = asked("a", version, (0.0, 0.0))
        PrefixTree().compose(at(version, [parent], restarts, num_problems=1, group_size=4))
        found.append((restarts.asked[0][1][0] % 100, len(restarts.asked[0][1])))
    assert found[0] == found[1]
    assert {first for first, _ in found} == {0, 1} and len({length for _, length in found}) > 1


# -- with engines --------------------------------------------------------------------------------------------------

ENGINES: dict[str, Callable[[], RolloutEngine]] = {"transformers": lambda: TransformersEngine(7), "vllm": VLLMEngine}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_restarted_responses_are_on_policy_and_graded_as_a_whole(name: str, policy: Path) -> None:
    """Log-probs after a prefix are the policy's, and the verifier reads prefix and continuation."""
    module, engine, task = attached(PolicyModule(path=str(policy))), ENGINES[name](), tiny_task()
    engine.start(EngineContext(policy, torch.device("cpu"), torch.float32, 0, 1, 32))
    limit, problems = 10, list(task.train_problems()[:12])
    with GradingPool(task.verify) as pool:
        prompts = PromptEncoder(policy, 16)
        generator = RolloutGenerator(prompts, engine, pool, PhaseClock(), 0, 1, torch.float32, None)
        first = generator.make(problems, 4, Sampling(limit), 5)
        prefixes = [cut_response(each.responses[0], (0.2, 0.9), Random(i)) for i, each in enumerate(first)]
        again = generator.make(problems, 4, Sampling(limit), 6, prefixes)
    engine.stop()
    assert len({len(prefix) for prefix in prefixes}) > 2
    logps = iter(module.logprobs(Minibatch(again, 0, 0)))
    differ, right = 0, 0
    for before, prefix, found in zip(first, prefixes, again, strict=True):
        assert found.prefix_tokens == len(prefix)
        assert torch.equal(found.prompt_ids, torch.cat((before.prompt_ids, prefix)))
        for each in found.responses:
            assert 1 <= len(each.token_ids) <= limit - len(prefix)
            assert float((next(logps) - each.behave_logp).abs().max()) < 1e-4
            whole = prompts.tokenizer.decode(torch.cat((prefix, each.token_ids)), skip_special_tokens=True)
            assert each.parts["score"] == task.verify(found.problem.answer, whole)["score"]
            differ += each.parts["score"] != task.verify(found.problem.answer, each.text)["score"]
            right += each.parts["acc"] == 1
    assert right and differ, "the continuation alone would have been graded the same"


def test_both_train(policy: Path, tmp_path: Path) -> None:
    restarting = PrefixRestarts(share=0.3)
    run = fit(policy, tmp_path / "rr", composer=restarting, iterations=4, lr=3e-4)
    assert restarting.report()["replay/restarted_groups"] == 3
    assert {row["total/responses"] for row in run.rows} >= {40.0, 160.0}  # as many as without restarts
    assert run.rows[-1].get("replay/groups", 0.0) == 0  # restarted groups are fresh
    tree = fit(
        policy,
        tmp_path / "tree",
        composer=PrefixTree(),
        iterations=3,
        lr=3e-4,
        model={"advantage": TreeBaseline("mean")},
    )
    assert tree.rows[-1]["total/responses"] == 120
    assert sum(row["train/grad_norm"] for row in tree.rows) > 0
