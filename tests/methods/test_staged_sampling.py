"""AR3PO's staged sampling: who gets more responses, how groups are joined, and when a stored response is reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group, iteration, response
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.methods.ar3po import StagedSampling, merged
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.replay.composer import Iteration


class Answers:
    """Samples scripted responses: each response takes the next character of its problem's string.

    The token ids, which number the samples, identify every response.
    """

    def __init__(self, script: dict[str, str]) -> None:
        self.script = {problem: list(marks) for problem, marks in script.items()}
        self.asked: list[tuple[list[str], int]] = []
        self.groups = self.sampled = 0

    def iteration(self, version: int, problems: Sequence[str], group_size: int) -> Iteration:
        def next_problems(count: int, n: int) -> list[Group]:
            return given_problems([Problem(p, "1,2>3:", None) for p in problems[:count]], n, None)

        def given_problems(asked: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None) -> list[Group]:
            self.asked.append(([p.id for p in asked], n))
            return [self.group(problem, n, version) for problem in asked]

        return iteration(
            version,
            num_problems=len(problems),
            group_size=group_size,
            next_problems=next_problems,
            given_problems=given_problems,
        )

    def group(self, problem: Problem, n: int, version: int) -> Group:
        scores = [float(self.script[problem.id].pop(0)) for _ in range(n)]
        made = replace(group(self.groups, version, problem.id), problem=problem)
        self.groups += 1
        responses = []
        for score in scores:
            responses.append(response((self.sampled,), (-0.1 * version - 0.1,), score))
            self.sampled += 1
        return replace(made, responses=responses)


def tokens(group: Group) -> list[int]:
    return [int(r.token_ids[0]) for r in group.responses]


def saved_and_read(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_only_problems_without_a_right_response_get_more() -> None:
    answers = Answers({"a": "10", "b": "0001", "c": "0000", "d": "11"})
    groups = StagedSampling(stages=2).compose(answers.iteration(3, "abcd", 4))
    assert answers.asked == [(["a", "b", "c", "d"], 2), (["b", "c"], 2)]
    assert [g.problem.id for g in groups] == ["a", "b", "c", "d"]
    assert [g.rewards("acc").tolist() for g in groups] == [[1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1]]
    # The first stage samples tokens 0 to 7, the second 8 and 9 for b, 10 and 11 for c.
    assert [tokens(g) for g in groups] == [[0, 1], [2, 3, 8, 9], [4, 5, 10, 11], [6, 7]]
    assert [g.id for g in groups] == [0, 1, 2, 3] and all(g.version == 3 for g in groups)


def test_stages_deal_out_the_group_size() -> None:
    answers = Answers({"a": "0" * 8})
    StagedSampling(stages=3).compose(answers.iteration(0, "a", 8))
    assert [n for _, n in answers.asked] == [3, 3, 2]
    answers = Answers({"a": "0010"})
    StagedSampling(stages=3).compose(answers.iteration(0, "a", 4))
    assert answers.asked == [(["a"], 2), (["a"], 1)]  # right at the third response: no third stage
    answers = Answers({"a": "00", "b": "11"})
    StagedSampling(stages=1).compose(answers.iteration(0, "ab", 2))
    assert answers.asked == [(["a", "b"], 2)]


def test_right_is_a_matter_of_acc() -> None:
    def partly(count: int, n: int) -> list[Group]:  # a score for the format, but none right
        return [group(0, 0, "a", scores=(0.9, 0.9), accs=(0.0, 0.0))]

    def more(asked: Sequence[Problem], n: int, prefixes: Any) -> list[Group]:
        return [group(1, 0, "a", scores=(0.0, 0.0), accs=(0.0, 1.0))]

    given = iteration(0, num_problems=1, group_size=4, next_problems=partly, given_problems=more)
    (found,) = StagedSampling().compose(given)
    assert len(found.responses) == 4


def test_a_stored_right_response_takes_the_place_of_the_last_wrong_one() -> None:
    answers = Answers({"a": "01" + "0000" + "0000", "b": "00000000"})
    composer = StagedSampling(stages=2)
    composer.compose(answers.iteration(2, "ab", 4))  # a: tokens 0, 1; b: 2, 3, 4, 5, none right
    rescued, hopeless = composer.compose(answers.iteration(5, "ab", 4))
    # a has 6, 7, then 10, 11, of which 1 replaces 11.
    assert tokens(rescued) == [6, 7, 10, 1]
    assert rescued.rewards("acc").tolist() == [0, 0, 0, 1] and rescued.is_effective()
    assert [rescued.version_of(r) for r in rescued.responses] == [5, 5, 5, 2]
    assert rescued.responses[-1].behave_logp.tolist() == pytest.approx([-0.3])  # as version 2 recorded it
    assert len(hopeless.responses) == 4 and not hopeless.is_effective()
    (again,) = composer.compose(answers.iteration(6, "a", 4))
    assert tokens(again)[-1] == 1  # reuse does not consume the response or make it younger
    assert again.version_of(again.responses[-1]) == 2


def test_the_behavior_weight_sees_the_stored_response_alone_as_old() -> None:
    answers = Answers({"a": "01" + "0000"})
    composer = StagedSampling()
    composer.compose(answers.iteration(1, "a", 4))
    rows = Minibatch(composer.compose(answers.iteration(4, "a", 4)), 4, 0).rows()
    assert [row.age for row in rows] == [0, 0, 0, 3]


def test_the_newest_right_response_is_stored() -> None:
    answers = Answers({"a": "10" + "11" + "0000"})
    composer = StagedSampling()
    composer.compose(answers.iteration(0, "a", 4))
    composer.compose(answers.iteration(1, "a", 4))  # tokens 2 and 3, both right
    (found,) = composer.compose(answers.iteration(2, "a", 4))
    assert tokens(found)[-1] == 3 and found.version_of(found.responses[-1]) == 1


def test_limits_of_age_and_number() -> None:
    def last(version: int, **settings: Any) -> list[bool]:
        answers = Answers(dict.fromkeys("abc", "10" + "0000"))
        composer = StagedSampling(**settings)
        composer.compose(answers.iteration(0, "abc", 4))
        return [g.is_effective() for g in composer.compose(answers.iteration(version, "abc", 4))]

    assert last(5) == [True, True, True]
    assert last(5, max_age=5) == [True, True, True]
    assert last(6, max_age=5) == [False, False, False]
    assert last(5, capacity=2) == [False, True, True]  # the one that went longest without a new response has left
    assert last(5, capacity=0) == [False, False, False]


def test_a_new_right_response_renews_a_problems_place() -> None:
    answers = Answers({"a": "10" + "10" + "0000", "b": "10" + "0000", "c": "10"})
    composer = StagedSampling(capacity=2)
    for version, problems in enumerate(("ab", "a", "c")):
        composer.compose(answers.iteration(version, problems, 4))
    a, b = composer.compose(answers.iteration(3, "ab", 4))
    assert a.is_effective() and not b.is_effective()


def test_groups_of_different_sizes_are_each_normalized_by_their_own_responses() -> None:
    answers = Answers({"a": "10", "b": "0001"})
    small, large = StagedSampling().compose(answers.iteration(0, "ab", 4))
    found = [torch.stack(GroupNormalized().for_group(g, "score")) for g in (small, large)]
    # (R - mean) / (std + 1e-6), with means 1/2 and 1/4, stds 0.7071 and 0.5
    assert found[0].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)
    assert found[1].tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-4)


def test_groups_of_other_problems_or_versions_do_not_merge() -> None:
    for other in (group(1, 0, "b"), group(1, 1, "a")):
        with pytest.raises(ValueError, match="groups 0 and 1 differ"):
            merged(group(0, 0, "a"), other)


def test_state_through_a_checkpoint(tmp_path: Path) -> None:
    script = {p: right + "0" * 60 for p, right in (("a", "01"), ("b", "0010"), ("c", "10"), ("d", "0001"), ("e", ""))}
    problems = ["abc", "cde", "bda", "eab", "cab", "dec", "abc", "bde"]

    def run(composer: StagedSampling, answers: Answers, versions: range) -> list[list[list[int]]]:
        return [
            [tokens(g) + [g.version_of(r) for r in g.responses] for g in composer.compose(answers.iteration(v, p, 4))]
            for v, p in zip(versions, problems[versions.start : versions.stop], strict=True)
        ]

    settings: dict[str, Any] = {"capacity": 3, "max_age": 6}
    expected = run(StagedSampling(**settings), Answers(script), range(8))
    answers, first, rest = Answers(script), StagedSampling(**settings), StagedSampling(**settings)
    assert run(first, answers, range(4)) == expected[:4]
    rest.load_state_dict(saved_and_read(first.state_dict(), tmp_path))
    assert run(rest, answers, range(4, 8)) == expected[4:]
    reused = [group[-1] for composed in expected[4:] for group in composed if group[-1] < 4]
    assert len(reused) > 3, "nothing was reused: the test would test nothing"


def test_bad_settings_are_named() -> None:
    for settings, named in (
        ({"stages": 0}, "stages is 0"),
        ({"capacity": -1}, "capacity is -1"),
        ({"max_age": 0}, "max_age is 0"),
    ):
        with pytest.raises(SettingError, match=named):
            StagedSampling(**settings)
    for stages, size in ((4, 4), (2, 2), (5, 4)):
        with pytest.raises(SettingError, match=f"stages is {stages}, which leaves 1 of {size} responses"):
            StagedSampling(stages).compose(Answers({"a": "0000"}).iteration(0, "a", size))
