"""Continuations of replayed responses for the critic alone: what is asked, who learns from them, and that they help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, iteration, response
from helpers.tiny_models import Run, fit, metrics, weights_of
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch, split_minibatches
from popo_lightning.core.problems import Problem
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.continuations import fresh_continuations
from popo_lightning.rollout.checks import check_continuations
from popo_lightning.rollout.report import RolloutReport, rollout_metrics
from popo_lightning.training.minibatch_targets import minibatch_targets


def long(id: int, tokens: int = 6) -> Group:
    made = group(id, version=1)
    made.responses[:] = [response(tokens=[10 * id + place for place in range(tokens)], score=s) for s in (0.0, 1.0)]
    return made


class Asked:
    """Answers each prefix with one more token and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Problem], int, list[Tensor]]] = []

    def __call__(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None) -> list[Group]:
        assert prefixes is not None
        self.calls.append((list(problems), n, list(prefixes)))
        return [
            replace(group(900 + i, version=5), prompt_ids=prefix, responses=[response(tokens=(7,), score=1.0)])
            for i, prefix in enumerate(prefixes)
        ]


def test_a_share_of_0_asks_for_nothing() -> None:
    """The given iteration refuses to sample and to draw random numbers."""

    def refuse(*purpose: object) -> Random:
        raise AssertionError(purpose)

    assert fresh_continuations(0.0, [long(1)], iteration(5, seeded=refuse)) == []
    assert fresh_continuations(0.5, [], iteration(5, seeded=refuse)) == []
    assert fresh_continuations(0.5, [group(1)], iteration(5, given_problems=Asked())) != []
    single = group(1)
    single.responses[:] = [response(tokens=(3,))] * 2
    assert fresh_continuations(1.0, [single], iteration(5, seeded=refuse)) == []


def test_a_prefix_is_the_beginning_of_a_replayed_response_and_never_all_of_it() -> None:
    asked, stored = Asked(), [long(id) for id in range(1, 26)]
    found = fresh_continuations(0.5, stored, iteration(5, given_problems=asked))
    ((problems, n, prefixes),) = asked.calls
    assert n == 1 and len(found) == len(problems) == 25 and all(each.critic_only for each in found)
    for problem, prefix in zip(problems, prefixes, strict=True):
        source = next(each for each in stored if each.problem is problem)
        assert 1 <= len(prefix) <= 5
        assert torch.equal(prefix, source.responses[0].token_ids[: len(prefix)])
    assert {len(prefix) for prefix in prefixes} == {1, 2, 3, 4, 5}
    again = Asked()
    fresh_continuations(0.5, stored, iteration(5, given_problems=again))
    assert all(torch.equal(one, other) for one, other in zip(prefixes, again.calls[0][2], strict=True))


def test_a_share_of_few_responses_is_rounded_by_lot() -> None:
    counts = []
    for version in range(400):
        asked = Asked()
        counts.append(len(fresh_continuations(0.15, [long(1)], iteration(version, given_problems=asked))))
    assert set(counts) == {0, 1} and sum(counts) / 400 == pytest.approx(0.3, abs=0.08)


def test_only_the_critic_has_them(tmp_path: Path) -> None:
    groups, further = [group(0, version=5), group(2, version=5)], replace(long(1), critic_only=True, version=5)
    minibatch = Minibatch(groups, 5, 0, critic_groups=[further])
    assert [each.id for each in minibatch.groups] == [0, 2] and len(minibatch.rows()) == 4
    assert minibatch.tokens == 8 and minibatch.critic_tokens == 8 + 12
    assert minibatch.of_critic is not None and [each.id for each in minibatch.of_critic.groups] == [1]
    assert Minibatch(groups[:1], 5, 0).of_critic is None
    torch.save(minibatch, tmp_path / "minibatch.pt")  # as a checkpoint stores the minibatches that are still to come
    read = torch.load(tmp_path / "minibatch.pt", weights_only=True)
    assert read.critic_tokens == 20 and [each.id for each in read.of_critic.groups] == [1]


def test_they_change_nothing_in_how_others_are_dealt_out() -> None:
    plain, further = [group(id) for id in range(7)], [replace(long(id), critic_only=True) for id in (20, 21, 22)]
    with_them = split_minibatches([*plain, *further], 0, 3, 2, Random(1))
    without = split_minibatches(plain, 0, 3, 2, Random(1))
    for one, other in zip(with_them, without, strict=True):
        assert [each.id for each in one.groups] == [each.id for each in other.groups]
        assert one.of_critic is not None and len(one.of_critic.groups) == 1 and other.of_critic is None


def test_they_come_to_parts_whose_step_is_taken() -> None:
    """A minibatch without a group for the policy takes no step, so it gets none."""
    plain, further = [group(id) for id in range(2)], [replace(long(id), critic_only=True) for id in range(20, 25)]
    found = split_minibatches([*plain, *further], 0, 4, 1, Random(1))
    learns = [0 if each.of_critic is None else len(each.of_critic.groups) for each in found]
    assert [len(each.groups) for each in found] == [1, 1, 0, 0] and learns == [3, 2, 0, 0]


def test_they_count_as_sampled_and_in_nothing_else() -> None:
    fresh, stored = [group(0, version=3), group(1, version=3, scores=(0.0, 0.0))], group(2, version=1)
    continued = replace(long(7), version=3)
    found = []
    for further in ([], [continued]):
        report = RolloutReport(3, "score")
        report.sampled(fresh)
        report.sampled(further)
        report.composed([fresh[0], stored, *(replace(each, critic_only=True) for each in further)])
        found.append(report.counts())
    without, counts = found
    assert counts["responses"] == without["responses"] + 2 and counts["tokens"] == without["tokens"] + 12
    assert rollout_metrics(counts) == rollout_metrics(without)
    assert counts["groups"] == 2 and counts["trained_groups"] == 2 and counts["replayed_groups"] == 1


# -- a token task of two steps -------------------------------------------------------------------------------------

FIRST, SECOND = 3, 2
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
PRESENT_SECOND = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
PRESENT_FIRST = torch.tensor([0.6, 0.3, 0.1])
KNOWN = (PRESENT_SECOND * REWARDS).sum(dim=1)  # value, under the present policy, after each first token


def stale_groups(groups: int, generator: torch.Generator) -> list[Group]:
    """Returns groups of a policy that chooses all tokens with equal probability."""
    found = []
    for id in range(groups):
        made = group(id, version=0)
        tokens = torch.stack([torch.randint(n, (8,), generator=generator) for n in (FIRST, SECOND)], dim=1)
        made.responses[:] = [response(tokens=(a, b), score=float(REWARDS[a, b])) for a, b in tokens.tolist()]
        found.append(made)
    return found


def learned(share: float) -> Tensor:
    """Returns the values after each first token, learned in eight epochs over a stale buffer."""
    generator = torch.Generator().manual_seed(3)
    stored, values = stale_groups(40, generator), torch.zeros(FIRST)

    def present(problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None) -> list[Group]:
        assert prefixes is not None
        found = []
        for id, prefix in enumerate(prefixes):
            (a,) = prefix.tolist()
            b = int(torch.multinomial(PRESENT_SECOND[a], 1, generator=generator))
            made = replace(group(id, version=9), prompt_ids=prefix)
            found.append(replace(made, responses=[response(tokens=(b,), score=float(REWARDS[a, b]))]))
        return found

    for sweep in range(8):
        further = fresh_continuations(share, stored, iteration(sweep, given_problems=present))
        minibatch = Minibatch([*stored, *further], 9, 0)
        sums, counts = torch.zeros(FIRST), torch.zeros(FIRST)
        for part in filter(None, (minibatch, minibatch.of_critic)):
            old = [torch.zeros(len(each.token_ids)) for each in part.responses]
            returns = minibatch_targets(part, GAE(), "score", Critic(), {"values": old}).of_critic["returns"]
            for row, target in zip(part.rows(), returns, strict=True):  # the last token is chosen after the first one
                begun = [*(row.prompt_ids.tolist() if part is minibatch.of_critic else []), *row.response.token_ids]
                sums[int(begun[0])] += target[-1]
                counts[int(begun[0])] += 1
        values += 0.5 * (sums / counts - values)
    return values


def test_the_critics_error_falls_with_the_share() -> None:
    """[N] It falls on the present policy's actions, and does not rise on replayed actions."""
    errors = [(learned(share) - KNOWN).abs() for share in (0.0, 0.05, 0.25)]
    on_present = [float((PRESENT_FIRST * error).sum()) for error in errors]
    on_replayed = [float(error.mean()) for error in errors]
    assert on_present[2] < on_present[1] < on_present[0] and on_present[2] < 0.9 * on_present[0]
    assert on_replayed[2] <= on_replayed[0] and on_replayed[1] <= on_replayed[0]


# -- in a run ------------------------------------------------------------------------------------------------------


def run(policy: Path, folder: Path, share: float | None, iterations: int = 3, **critic: Any) -> Run:
    settings = {} if share is None else {"fresh_continuations": share}
    composer = PrioritizedGroupReplay(GroupReplayBuffer(32), **settings)
    model = {"advantage": GAE(), "critic": Critic(**critic)}
    return fit(policy, folder, composer=composer, model=model, iterations=iterations)


def test_without_a_share_nothing_changes(policy: Path, tmp_path: Path) -> None:
    plain, none = (run(policy, tmp_path / str(each), each, 2, lr=1e-2) for each in (None, 0.0))
    assert metrics(plain.folder) == metrics(none.folder)
    assert all(torch.equal(weight, none.weights[name]) for name, weight in plain.weights.items())


def test_the_policy_learns_nothing_from_them(policy: Path, tmp_path: Path) -> None:
    """With a critic that stays at 0 the policy is bit for bit the one without. Only the number of responses rises."""
    plain, continued = run(policy, tmp_path / "plain", 0.0, lr=0.0), run(policy, tmp_path / "some", 0.5, lr=0.0)
    after = weights_of(continued.module.model)
    assert all(torch.equal(weight, after[name]) for name, weight in weights_of(plain.module.model).items())
    more = continued.rows[-1]["total/responses"] - plain.rows[-1]["total/responses"]
    assert more > 0.25 * 4 * sum(row["replay/groups"] for row in plain.rows)
    for one, other in zip(continued.rows, plain.rows, strict=True):
        same = {name for name in other if not name.startswith(("total/", "train/value_loss", "throughput"))}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_the_critic_learns_from_them(policy: Path, tmp_path: Path) -> None:
    plain, continued = run(policy, tmp_path / "plain", 0.0, lr=1e-3), run(policy, tmp_path / "some", 0.5, lr=1e-3)
    one, other = (weights_of(each.module.value_model)["head.weight"] for each in (plain, continued))
    assert not torch.equal(one, other) and bool(torch.isfinite(other).all())


def test_settings_are_checked() -> None:
    for share in (-0.1, 1.5):
        with pytest.raises(SettingError, match=r"PrioritizedGroupReplay\.fresh_continuations is "):
            PrioritizedGroupReplay(GroupReplayBuffer(4), fresh_continuations=share)
    made = PrioritizedGroupReplay(GroupReplayBuffer(4), fresh_continuations=0.05)
    assert not made.supports_async and PrioritizedGroupReplay(GroupReplayBuffer(4)).supports_async

    class Data:
        composer = made
        weight_sync_interval = 1

    check_continuations(Data, split=False)
    with pytest.raises(SettingError, match=r"ModelParallelStrategy splits the critic.*use trainer\.strategy ddp"):
        check_continuations(Data, split=True)
    Data.weight_sync_interval = 4
    with pytest.raises(SettingError, match=r"weight_sync_interval is 4; set that to 1, or fresh_continuations to 0"):
        check_continuations(Data, split=False)
