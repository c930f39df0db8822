"""Dynamic sampling: how many problems are asked, what becomes of the surplus, and what happens at the cap."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.methods.dapo import AdaptiveChunk, DynamicSampling, FixedChunk
from popo_lightning.replay.composer import Iteration

DULL = (1.0, 1.0)  # scores of an ineffective group


class Supply:
    """Supplies groups without end and records requests. Group n is effective if the repeated pattern has a 1 at n."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.made = 0
        self.asked: list[int] = []

    def iteration(self, version: int, num_problems: int, effective_key: str = "score") -> Iteration:
        def next_problems(count: int, n: int) -> list[Group]:
            assert n == 2
            self.asked.append(count)
            return [self.next_group(version) for _ in range(count)]

        return iteration(version, effective_key=effective_key, num_problems=num_problems, next_problems=next_problems)

    def next_group(self, version: int) -> Group:
        effective = self.pattern[self.made % len(self.pattern)] == "1"
        self.made += 1
        return group(self.made - 1, version, scores=(0.0, 1.0) if effective else DULL)

    def counts(self) -> list[int]:
        counts, self.asked = self.asked, []
        return counts


def saved_and_read(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


# -- chunks --------------------------------------------------------------------------------------------------------


def test_fixed_chunks_round_up() -> None:
    assert FixedChunk(0.25)(missing=9, asked=8, ineffective=8, problems=8) == 2
    assert FixedChunk(0.25)(1, 9, 0, 9) == 3
    assert FixedChunk(1.0)(1, 8, 0, 8) == 8


def test_adaptive_chunk_is_what_should_give_the_missing_ones() -> None:
    chunk = AdaptiveChunk(factor=1.25, min_share=0.25, max_share=1.5)
    # GRESO's own sizes. With 100 missing at 60% ineffective, the chunk is 1.25 * 100 / 0.4 = 312.5.
    assert chunk(missing=100, asked=320, ineffective=192, problems=256) == 313
    assert chunk(10, 256, 128, 256) == 64  # 25, below the minimum
    assert chunk(200, 256, 192, 256) == 384  # 1,000, above the maximum
    assert chunk(256, 256, 256, 256) == 384  # nothing observed to divide by
    assert AdaptiveChunk(1.0, 0.01, 9.0)(30, 100, 70, 100) == 100  # exactly 30 / 0.3, no extra problem


def test_bad_chunks_are_named() -> None:
    for make, named in (
        (lambda: FixedChunk(0.0), "chunk.share is 0.0"),
        (lambda: AdaptiveChunk(factor=0), "chunk.factor is 0"),
        (lambda: AdaptiveChunk(min_share=0), "chunk.min_share is 0"),
        (lambda: AdaptiveChunk(min_share=0.5, max_share=0.4), "chunk.max_share is 0.4"),
        (lambda: AdaptiveChunk(max_share=float("inf")), "chunk.max_share is inf"),
    ):
        with pytest.raises(SettingError, match=named):
            make()


# -- filling the batch ---------------------------------------------------------------------------------------------


def test_asks_in_chunks_until_the_batch_is_full() -> None:
    supply = Supply("1000")  # every fourth group: 0, 4, 8, ...
    composer = DynamicSampling(FixedChunk(0.5), surplus="discard")
    batch = composer.compose(supply.iteration(0, num_problems=4))
    assert ids(batch) == [0, 4, 8, 12]
    # 4 problems gave 1, then chunks of 2 until the 13th problem: 4 + 5 * 2 = 14.
    assert supply.counts() == [4, 2, 2, 2, 2, 2]


def test_an_effective_batch_costs_no_problem_more() -> None:
    supply = Supply("1")
    composer = DynamicSampling(FixedChunk(1.0))
    for version in range(3):
        assert len(composer.compose(supply.iteration(version, num_problems=4))) == 4
    assert supply.counts() == [4, 4, 4]


def test_the_first_call_may_be_larger() -> None:
    supply = Supply("10")
    composer = DynamicSampling(FixedChunk(0.25), surplus="discard", first=1.5)
    assert ids(composer.compose(supply.iteration(0, num_problems=4))) == [0, 2, 4, 6]
    assert supply.counts() == [6, 1]


def test_effective_by_the_part_that_is_named() -> None:
    def shaped(count: int, n: int) -> list[Group]:  # right and wrong responses only if the id is odd
        return [group(i, 0, scores=(0.0, 0.1), accs=(0.0, float(i % 2))) for i in range(count)]

    composer = DynamicSampling(max_batches=1)
    found = composer.compose(iteration(0, effective_key="acc", num_problems=4, next_problems=shaped))
    assert ids(found) == [1, 3]


def test_adaptive_chunks_see_all_calls_of_the_iteration() -> None:
    supply = Supply("1000" + "0000" + "11111111")
    composer = DynamicSampling(AdaptiveChunk(factor=1.0, min_share=0.25, max_share=2.0))
    assert len(composer.compose(supply.iteration(0, num_problems=4))) == 4
    # 4 asked, 1 effective, 3 missing: 3 / (1/4) = 12, of which at most 8. These give 4, of which 3 were missing.
    assert supply.counts() == [4, 8]
    supply = Supply("1100" + "1000" + "1")
    composer.load_state_dict({"_carried": []})
    assert len(composer.compose(supply.iteration(0, num_problems=4))) == 4
    # 2 / (2/4) = 4. Then 3 of 8 asked are effective and 1 is missing: 1 / (3/8) = 2.67.
    assert supply.counts() == [4, 4, 3]


# -- surplus -------------------------------------------------------------------------------------------------------


def test_surplus_is_trained_on_first_in_the_next_iteration_which_asks_fewer() -> None:
    supply = Supply("10" + "1111" + "100000" + "1" * 20)
    composer = DynamicSampling(FixedChunk(1.0), surplus="carry")
    # 4 asked: 0, 2, 3. 4 more: 4, 5, 6, of which one is missing.
    assert ids(composer.compose(supply.iteration(0, num_problems=4))) == [0, 2, 3, 4]
    assert supply.counts() == [4, 4]
    # 5 and 6 wait, so two are asked (8 and 9: dull), then a chunk of 4 (10, 11: dull, 12, 13).
    second = composer.compose(supply.iteration(1, num_problems=4))
    assert ids(second) == [5, 6, 12, 13]
    assert [g.version for g in second] == [0, 0, 1, 1]  # carried groups keep theirs, so the behavior weight applies
    assert supply.counts() == [2, 4]
    assert ids(composer.compose(supply.iteration(2, num_problems=4))) == [14, 15, 16, 17]
    assert supply.counts() == [4]


def test_surplus_is_thrown_away() -> None:
    supply = Supply("10" + "1" * 40)
    composer = DynamicSampling(FixedChunk(1.0), surplus="discard")
    assert ids(composer.compose(supply.iteration(0, num_problems=4))) == [0, 2, 3, 4]
    second = composer.compose(supply.iteration(1, num_problems=4))
    assert ids(second) == [8, 9, 10, 11] and all(g.version == 1 for g in second)
    assert supply.counts() == [4, 4, 4]


def test_a_surplus_of_more_than_a_batch_lasts_two_iterations() -> None:
    supply = Supply("0" + "1" * 40)
    composer = DynamicSampling(FixedChunk(3.0))
    assert ids(composer.compose(supply.iteration(0, num_problems=2))) == [1, 2]
    assert supply.counts() == [2, 6]
    assert ids(composer.compose(supply.iteration(1, num_problems=2))) == [3, 4]
    assert ids(composer.compose(supply.iteration(2, num_problems=2))) == [5, 6]
    assert supply.counts() == []
    assert ids(composer.compose(supply.iteration(3, num_problems=2))) == [7, 8]


@pytest.mark.slow
def test_small_chunks_and_carrying_pay_what_is_due() -> None:
    """At an effective share of 0.7 a batch needs 1 / 0.7 = 1.43 batches. Whole batches with the surplus lost cost 2."""

    def paid(composer: DynamicSampling) -> float:
        supply = Supply("1110111010")
        for version in range(200):
            assert len(composer.compose(supply.iteration(version, num_problems=32))) == 32
        return sum(supply.counts()) / (200 * 32)

    assert paid(DynamicSampling(AdaptiveChunk(1.0, 0.125, 1.0))) == pytest.approx(1 / 0.7, rel=0.005)
    assert paid(DynamicSampling(FixedChunk(0.25))) == pytest.approx(1 / 0.7, rel=0.005)
    assert paid(DynamicSampling(FixedChunk(1.0), surplus="discard")) == 2.0


def test_state_through_a_checkpoint(tmp_path: Path) -> None:
    def run(composer: DynamicSampling, supply: Supply, versions: Sequence[int]) -> list[list[int]]:
        return [ids(composer.compose(supply.iteration(version, num_problems=5))) for version in versions]

    expected = run(DynamicSampling(FixedChunk(1.0)), Supply("110100"), range(8))
    supply, first = Supply("110100"), DynamicSampling(FixedChunk(1.0))
    assert run(first, supply, range(1)) == expected[:1]
    state = first.state_dict()
    assert state["_carried"], "nothing carried: the test would test nothing"
    rest = DynamicSampling(FixedChunk(1.0))
    rest.load_state_dict(saved_and_read(state, tmp_path))
    assert run(rest, supply, range(1, 8)) == expected[1:]


# -- the cap -------------------------------------------------------------------------------------------------------


def at_cap(choice: Any, pattern: str, max_batches: float = 2.5) -> tuple[list[int], list[int]]:
    supply = Supply(pattern)
    composer = DynamicSampling(FixedChunk(1.0), max_batches=max_batches, at_cap=choice)
    return ids(composer.compose(supply.iteration(0, num_problems=4))), supply.counts()


def test_the_cap_bounds_what_is_asked() -> None:
    assert at_cap("short", "0") == ([], [4, 4, 2])
    assert at_cap("short", "00001", 1.0) == ([], [4])
    assert at_cap("short", "0" * 9 + "1") == ([9], [4, 4, 2])


def test_what_the_batch_is_at_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    pattern = "0" * 4 + "1" + "0" * 4 + "1"
    with caplog.at_level(logging.WARNING):
        assert at_cap("short", pattern)[0] == [4, 9]
    assert "2 of 4 effective groups after 10 problems" in caplog.text
    assert at_cap("ineffective", pattern)[0] == [4, 9, 0, 1]
    assert at_cap("repeat", "0" * 4 + "1" + "0" * 5)[0] == [4, 4, 4, 4]
    assert at_cap("repeat", pattern)[0] == [4, 9, 4, 9]
    assert at_cap("repeat", "0")[0] == []
    with pytest.raises(SettingError, match=r"max_batches is 2\.5, but there were only 2 of 4 effective"):
        at_cap("error", pattern)


def test_a_full_batch_at_the_cap_is_no_cap() -> None:
    assert at_cap("error", "1100", 2.0) == ([0, 1, 4, 5], [4, 4])


def test_carried_groups_count_towards_a_batch_at_the_cap() -> None:
    supply = Supply("1111" + "0" * 90)
    composer = DynamicSampling(FixedChunk(1.0), first=2.0, max_batches=2.0)
    assert ids(composer.compose(supply.iteration(0, num_problems=3))) == [0, 1, 2]
    assert ids(composer.compose(supply.iteration(1, num_problems=3))) == [3]
    assert supply.counts() == [6, 4, 2]
    assert ids(composer.compose(supply.iteration(2, num_problems=3))) == []  # used up, not replayed


def test_bad_settings_are_named() -> None:
    for settings, named in (
        ({"surplus": "keep"}, "surplus is 'keep'"),
        ({"first": 0}, "first is 0"),
        ({"max_batches": 0.5}, "max_batches is 0.5"),
        ({"max_batches": float("inf")}, "max_batches is inf"),
        ({"at_cap": "stop"}, "at_cap is 'stop'"),
    ):
        with pytest.raises(SettingError, match=named):
            DynamicSampling(**settings)
