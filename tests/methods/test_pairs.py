"""Preference pairs: made from groups, chosen, and made without a verifier, and real trainings on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response
from helpers.processes import Steps, on_two_ranks, rows_of, train, whole_tensors
from helpers.tiny_models import fit, method, metrics, popo, random_model
from objectives.test_identities import Watch, farthest, one_response, step_of
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.methods.opa_dpo import OPADPO
from popo_lightning.methods.sera import SeRA, chosen_by_margin
from popo_lightning.metrics.monitors import NAMES
from popo_lightning.objectives.aggregations import PairMean
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.pair_loss import PairLoss
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.policy import PolicyModule
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Iteration
from popo_lightning.replay.pairs import Pairs, ReplayedPairs, as_pair, best_and_worst

DULL = (1.0, 1.0)


def scores(pair: Group) -> list[float]:
    return [float(score) for score in pair.rewards()]


# -- pairs of a group ----------------------------------------------------------------------------------------------


def test_best_and_worst_then_second_best_and_second_worst() -> None:
    four = group(0, scores=(0.25, 1.0, 0.0, 0.75))
    found = best_and_worst(four, "score", 8, Random(0))
    assert [scores(pair) for pair in found] == [[1.0, 0.0], [0.75, 0.25]]
    assert scores(best_and_worst(four, "score", 1, Random(0))[0]) == [1.0, 0.0]
    for pair in found:
        assert pair.advantages is not None and pair.advantages.tolist() == [1.0, -1.0]
        assert (pair.id, pair.loss_weight, pair.prompt_ids.tolist()) == (0, 1.0, [4, 5])


def test_equal_rewards_make_no_pair() -> None:
    assert [scores(pair) for pair in best_and_worst(group(0, scores=(0.0, 1.0, 1.0, 1.0)), "score", 2, Random(0))] == [
        [1.0, 0.0]
    ]
    assert best_and_worst(group(0, scores=(1.0, 1.0 + 1e-7)), "score", 1, Random(0)) == []
    other = group(0, scores=(0.0, 1.0), accs=(1.0, 0.0))
    assert scores(best_and_worst(other, "acc", 1, Random(0))[0]) == [0.0, 1.0]


def test_equal_responses_meet_at_random() -> None:
    four = group(0, scores=(1.0, 0.0, 1.0, 0.0))
    four = replace(four, responses=[replace(r, text=str(i)) for i, r in enumerate(four.responses)])
    met = Counter(
        "".join(r.text for r in best_and_worst(four, "score", 1, Random(seed))[0].responses) for seed in range(400)
    )
    assert set(met) == {"01", "03", "21", "23"}
    assert all(count == pytest.approx(100, abs=40) for count in met.values())
    both = best_and_worst(four, "score", 2, Random(1))
    assert sorted(r.text for pair in both for r in pair.responses) == ["0", "1", "2", "3"]


def test_pairs_come_from_effective_fresh_groups() -> None:
    found = Pairs().compose(iteration(0, [group(0), group(1, scores=DULL), group(2)]))
    assert ids(found) == [0, 2] and all(scores(pair) == [1.0, 0.0] for pair in found)


def test_the_part_that_makes_a_group_effective_decides_its_pairs() -> None:
    shaped = group(0, scores=(0.2, 1.0, 0.6), accs=(1.0, 0.0, 0.0))
    (pair,) = Pairs().compose(iteration(0, [shaped], effective_key="acc"))
    assert pair.rewards("acc").tolist() == [1.0, 0.0] and scores(pair)[0] == pytest.approx(0.2)


def test_stored_groups_make_pairs_in_the_place_of_ineffective_ones() -> None:
    composer = ReplayedPairs(GroupReplayBuffer())
    assert ids(composer.compose(iteration(0, [group(0), group(1), group(2, scores=DULL)]))) == [0, 1]
    later = composer.compose(iteration(1, [group(3, 1), group(4, 1, scores=DULL), group(5, 1, scores=DULL)]))
    assert ids(later) == [3, 0, 1] and [pair.version for pair in later] == [1, 0, 0]
    assert len(composer.buffer.newest(9, 2)[0].responses) == 2  # whole groups are stored


def test_a_stored_group_is_paired_anew() -> None:
    four = group(0, scores=(1.0, 1.0, 0.0, 0.0))
    four = replace(four, responses=[replace(r, text=str(i)) for i, r in enumerate(four.responses)])
    composer = ReplayedPairs(GroupReplayBuffer(max_age=None))
    composer.compose(iteration(0, [four]))
    met = {
        tuple(r.text for r in composer.compose(iteration(version, [group(9, version, scores=DULL)]))[0].responses)
        for version in range(1, 30)
    }
    assert len(met) == 4


# -- implicit rewards ----------------------------------------------------------------------------------------------


class Table:
    """Holds policies over a few answers of one token each, the same for every problem."""

    def __init__(self, answers: int, seed: int = 0) -> None:
        self.first = torch.randn(answers, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
        self.present = self.first.clone()

    def scored(self, logps: Tensor, groups: Sequence[Group]) -> list[list[Tensor]]:
        return [[logps[r.token_ids] for r in each.responses] for each in groups]

    def iteration(self, version: int, fresh: Sequence[Group]) -> Iteration:
        return iteration(
            version,
            fresh,
            present_logprobs=lambda groups: self.scored(self.present, groups),
            first_logprobs=lambda groups: self.scored(self.first, groups),
        )

    def train(self, region: PairLoss, pairs: Sequence[Group], lr: float, batch: int = 20) -> None:
        """Trains one epoch on pairs."""
        objective = Objective(NoCorrection(), region, aggregation=PairMean())
        logits = self.present.clone().requires_grad_()
        for start in range(0, len(pairs), batch):
            some = pairs[start : start + batch]
            answers = torch.tensor([int(r.token_ids) for pair in some for r in pair.responses])
            logp = logits.log_softmax(-1)[answers][:, None]
            rows = ObjectiveInputs(
                logp=logp,
                prox_logp=logp.detach(),
                behave_logp=logp.detach(),
                advantages=torch.tensor([1.0, -1.0]).double().repeat(len(some))[:, None],
                mask=torch.ones_like(logp, dtype=torch.bool),
                fresh=torch.ones(len(logp), dtype=torch.bool),
                ref_logp=self.first[answers][:, None],
            )
            rows.rival = region.log_ratios(rows).view(-1, 2).flip(1).view(-1, 1)
            loss, _ = objective(rows, len(some))
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - lr * gradient).detach().requires_grad_()
        self.present = logits.detach().log_softmax(-1)


def answered(id: int, answers: Sequence[int], rewards: Sequence[float], version: int = 0) -> Group:
    responses = [response((a,), (-1.0,), score) for a, score in zip(answers, rewards, strict=True)]
    return Group(id, Problem(f"problem {id}", "", None), torch.tensor([1]), responses, version)


HIDDEN = torch.tensor([0.9, 0.1, -0.4, 0.6, -1.0, 0.4])  # true rewards of six answers


def noisy_groups(count: int, flipped: float, seed: int = 0) -> list[Group]:
    """Returns groups of two different answers. The better one is marked right, or the other one by mistake."""
    random, found = Random(seed), []
    for id in range(count):
        answers = random.sample(range(len(HIDDEN)), 2)
        first_is_better = bool(HIDDEN[answers[0]] > HIDDEN[answers[1]]) != (random.random() < flipped)
        found.append(answered(id, answers, (1.0, 0.0) if first_is_better else (0.0, 1.0)))
    return found


def agreement(pairs: Sequence[Group]) -> float:
    """Returns the share of pairs whose first response is truly better."""
    answers = [[int(r.token_ids) for r in pair.responses] for pair in pairs]
    return sum(float(HIDDEN[better] > HIDDEN[worse]) for better, worse in answers) / len(answers)


def sera(**settings: Any) -> SeRA:
    return SeRA(GroupReplayBuffer(), **settings)


def test_margins_choose_by_hand() -> None:
    margins = [0.5, -1.0, 3.0, 0.0, 2.0]
    for share, kept, places in (
        (0.4, "largest", [2, 4]),
        (0.4, "smallest", [1, 3]),
        (0.6, "middle", [0, 3, 4]),
        (0.0, "largest", [2]),
        (1.0, "middle", [0, 1, 2, 3, 4]),
    ):
        assert chosen_by_margin(margins, share, kept, Random(0)) == places  # type: ignore[arg-type]
    assert chosen_by_margin([], 0.5, "largest", Random(0)) == []


def test_the_policy_it_began_with_has_no_margins_and_chooses_at_random() -> None:
    table, groups = Table(6), noisy_groups(40, 0.2)
    composer = sera(bootstrap=0.5, min_margin=0.0)
    found = composer.compose(table.iteration(0, groups))
    assert len(found) == 20
    half = {"pairs/margin": 0.0, "pairs/kept_margin": 0.0, "pairs/accuracy": 0.5, "pairs/bootstrapped_share": 0.0}
    assert composer.report() == half
    assert ids(sera().compose(table.iteration(0, groups))) == ids(found)  # the seed decides
    drawn = Counter(i for seed in range(200) for i in chosen_by_margin([0.0] * 4, 0.5, "largest", Random(seed)))
    assert all(count == pytest.approx(100, abs=30) for count in drawn.values()) and len(drawn) == 4
    for version in (1, 2):  # All are wrong, so they wait. Then no margin is large enough for a pair.
        dull = [answered(100 + 10 * version + i, (0, 1, 2), (0.0, 0.0, 0.0), version) for i in range(4)]
        composer.compose(table.iteration(version, dull))
        assert composer.report()["pairs/bootstrapped_share"] == 0


def test_noisy_labels_are_left_out_by_their_margins() -> None:
    """A fifth of the labels is wrong, but fewer for the largest margins after an epoch on all pairs."""
    table, groups = Table(6), noisy_groups(400, 0.2)
    everything = sera(margin_share=1.0)
    pairs = everything.compose(table.iteration(0, groups))
    assert len(pairs) == 400 and agreement(pairs) == pytest.approx(0.8, abs=0.04)
    assert not everything.needs_reference and sera().needs_reference
    table.train(PairLoss(0.1, "first"), pairs, lr=5.0)
    shares: dict[str, float] = {}
    for kept in ("largest", "middle", "smallest"):
        composer = sera(margin_share=0.5, kept=kept)
        shares[kept] = agreement(composer.compose(table.iteration(1, groups)))
    assert shares["largest"] > 0.95 and shares["smallest"] < 0.75
    report = composer.report()
    assert report["pairs/accuracy"] == pytest.approx(agreement(pairs), abs=0.06)  # the policy agrees with true labels
    assert report["pairs/kept_margin"] < report["pairs/margin"]


def test_a_constant_on_a_prompts_log_ratios_changes_nothing() -> None:
    table, groups = Table(6), noisy_groups(60, 0.2)
    table.train(PairLoss(0.1, "first"), Pairs().compose(iteration(0, groups)), lr=5.0)
    # These values are exact in float64, so equal margins stay equal.
    table.first, table.present = ((1024 * logps).round() / 1024 for logps in (table.first, table.present))
    shift = {each.problem.id: Random(each.id).randint(-9, 9) for each in groups}

    def shifted(asked: Sequence[Group]) -> list[list[Tensor]]:
        found = table.scored(table.present, asked)
        return [[logp + shift[each.problem.id] for logp in of] for each, of in zip(asked, found, strict=True)]

    plain = sera().compose(table.iteration(1, groups))
    moved = sera().compose(replace(table.iteration(1, groups), present_logprobs=shifted))  # type: ignore[type-var]
    assert ids(plain) == ids(moved) and len(plain) == 30


def test_a_pair_of_an_ineffective_group_by_hand() -> None:
    """D before is (2, 0, 1), after (0, 0.4, 1): the means are 1, 0.2 and 1, a tie that the first response wins."""
    first = torch.zeros(3).double()
    before, after = torch.tensor([2.0, 0.0, 1.0]).double(), torch.tensor([0.0, 0.4, 1.0 - 1e-9]).double()
    for least, made in ((0.75, True), (0.85, False)):
        composer, table = sera(margin_share=1.0, bootstrap=0.25, min_margin=least), Table(3)
        table.first, table.present = first, before
        assert composer.compose(table.iteration(3, [answered(7, (0, 1, 2), (0.0, 0.0, 0.0), 3)])) == []
        table.present = after
        found = composer.compose(table.iteration(4, [answered(8, (0, 1), (1.0, 0.0), 4)]))
        assert ids(found) == ([8, 7] if made else [8])
        assert composer.report() == {"pairs/bootstrapped_share": 0.5 if made else 0.0}
        if made:
            assert [int(r.token_ids) for r in found[1].responses] == [0, 1]
            assert (found[1].loss_weight, found[1].version) == (0.25, 3) and found[0].loss_weight == 1.0
        assert ids(composer.compose(table.iteration(5, [answered(9, (0, 1), (1.0, 0.0), 5)]))) == [9]  # it waits once


def bootstrapped_agreement(table: Table, groups: int = 300) -> float:
    """Returns the agreement of pairs that the implicit reward alone makes."""
    random, composer = Random(3), sera(margin_share=1.0, bootstrap=0.5, min_margin=1e-6)
    dull = [answered(i, random.sample(range(6), 2), (0.0, 0.0)) for i in range(groups)]
    composer.compose(table.iteration(1, dull))
    made = composer.compose(table.iteration(2, [answered(999, (0, 1), DULL, 2)]))
    assert len(made) == groups and composer.report()["pairs/bootstrapped_share"] == 1
    return agreement(made)


def test_bootstrapped_pairs_agree_with_the_hidden_reward_after_training() -> None:
    before = []
    for seed in range(40):  # policies moved at random
        table = Table(6)
        table.present = table.first + torch.randn(6, generator=torch.Generator().manual_seed(seed)).double()
        before.append(bootstrapped_agreement(table, 30))
    assert sum(before) / len(before) == pytest.approx(0.5, abs=0.12)
    table = Table(6)
    table.train(PairLoss(0.1, "first"), Pairs().compose(iteration(0, noisy_groups(400, 0.2))), lr=5.0)
    assert bootstrapped_agreement(table) > 0.9


def test_off_asks_for_nothing() -> None:
    """No log-probs are computed, which the given iteration would refuse, and no groups wait."""
    composer = sera(margin_share=1.0)
    found = composer.compose(iteration(0, [group(0), group(1, scores=DULL)]))
    plain = ReplayedPairs(GroupReplayBuffer()).compose(iteration(0, [group(0), group(1, scores=DULL)]))
    assert ids(found) == ids(plain) == [0] and composer.state_dict()["_waiting"] == []


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_sera_resumes(stop: int, tmp_path: Path) -> None:
    def made() -> SeRA:
        return sera(margin_share=0.5, bootstrap=0.5, min_margin=0.1, pairs_per_group=2)

    def run(stop: int | None) -> list[Any]:
        composer, found = made(), []
        for version in range(7):
            if version == stop:
                torch.save(composer.state_dict(), tmp_path / "state.pt")
                composer = made()
                composer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            table, random = Table(6), Random(version)
            table.present = table.first + torch.randn(6, generator=torch.Generator().manual_seed(version)).double()
            rewards = [(1.0, 0.0, 1.0, 0.0), (0.0,) * 4, (1.0, 0.0, 0.0, 0.0), (1.0,) * 4]
            fresh = [
                answered(10 * version + i, random.sample(range(6), 4), rewards[(i + version) % 4], version)
                for i in range(5)
            ]
            pairs = composer.compose(table.iteration(version, fresh))
            tokens = [[int(r.token_ids) for r in pair.responses] for pair in pairs]
            found.append((ids(pairs), tokens, [pair.loss_weight for pair in pairs], composer.report()))
        return found

    whole = run(None)
    assert run(stop) == whole
    assert sum(report["pairs/bootstrapped_share"] > 0 for *_, report in whole) > 3


def test_ranks_deal_out_what_they_kept() -> None:
    states = []
    for rank in range(2):
        composer = sera(margin_share=1.0, bootstrap=1.0)
        composer.compose(Table(6).iteration(0, [answered(10 * rank + i, (0, 1), (1.0, i % 2)) for i in range(4)]))
        states.append(composer.state_dict())
    (one,) = composer.reshard(states, 1)
    assert sorted(ids([stored for stored, _ in one["buffer"]["groups"]])) == [0, 2, 10, 12]
    assert sorted(ids([waiting for waiting, _, _ in one["_waiting"]])) == [1, 3, 11, 13]
    three = composer.reshard([one], 3)
    assert sum(len(state["_waiting"]) for state in three) == 4
    composer.load_state_dict(three[0])
    (buffer_only,) = ReplayedPairs(GroupReplayBuffer()).reshard(states, 1)
    assert buffer_only["buffer"] == one["buffer"]


def test_settings_that_cannot_work_are_refused() -> None:
    for build, sentence in (
        (lambda: Pairs(0), "Pairs.pairs_per_group is 0"),
        (lambda: ReplayedPairs(GroupReplayBuffer(), 0), "ReplayedPairs.pairs_per_group is 0"),
        (lambda: sera(margin_share=1.1), "SeRA.margin_share is 1.1"),
        (lambda: sera(kept="best"), "SeRA.kept is 'best'"),
        (lambda: sera(bootstrap=-0.1), "SeRA.bootstrap is -0.1"),
        (lambda: sera(min_margin=-1.0), "SeRA.min_margin is -1.0"),
    ):
        with pytest.raises(SettingError, match=sentence):
            build()


# -- real trainings ------------------------------------------------------------------------------------------------


def pairwise(region: PairLoss) -> Objective:
    return Objective(NoCorrection(), region, aggregation=PairMean())


def apart(gradient: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the largest difference of two gradients, relative to the largest entry."""
    return farthest(gradient, other) / max(float(each.abs().max()) for each in gradient.values())


def by_hand(folder: Path, seen: Any, region: OPADPO) -> dict[str, Tensor]:
    """Computes the gradient of the mean over pairs, both responses in one graph, without the package's code."""
    model, old = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    model.load_state_dict(seen.weights, strict=False)
    if not region.needs_reference:
        old.load_state_dict(seen.start, strict=False)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start.load_state_dict(seen.start, strict=False)
    total = torch.tensor(0.0)
    for pair in seen.batch.groups:
        best, worst = pair.responses
        logps = [one_response(model, pair.prompt_ids, r.token_ids).sum() for r in pair.responses]
        with torch.no_grad():
            olds = [one_response(old, pair.prompt_ids, r.token_ids).sum() for r in pair.responses]
            prox = one_response(start, pair.prompt_ids, best.token_ids)
        d = [logp - reference for logp, reference in zip(logps, olds, strict=True)]
        unlikely = 0.0
        if pair.version < seen.batch.version:
            unlikely = 1 - min(1.0, math.exp(float((prox - best.behave_logp).mean())))
        assert best.parts["score"] > worst.parts["score"]
        loss = -logsigmoid(region.beta * (d[0] - d[1])) - region.anchor * logsigmoid(region.beta * d[0])
        total = total + loss - region.opa * unlikely * logps[0]
    (total / len(seen.batch.groups)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reference", ["prox", "first"])
def test_gradients_by_hand_however_rows_are_split(policy: Path, tmp_path: Path, reference: Any) -> None:
    """The minibatches of a training with replay are first and later ones of an iteration, of fresh and stored pairs."""
    watch, region = Watch(), OPADPO(0.5, reference, anchor=0.5, opa=0.3)
    composer = ReplayedPairs(GroupReplayBuffer(32), pairs_per_group=2)
    settings: dict[str, Any] = {"iterations": 3, "lr": 0.1, "optimizer": torch.optim.SGD, "max_grad_norm": None}
    run = fit(policy, tmp_path, objective=pairwise(region), composer=composer, callbacks=[watch], **settings)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    assert all(row["region/pair_accuracy"] > 0 and row["region/pair_margin"] != 0 for row in run.rows[1:])
    for seen in watch.seen:
        expected = by_hand(policy, seen, region)
        assert apart(seen.gradient, expected) < 1e-4
    seen = watch.seen[-1]
    parts = [step_of(policy, seen, pairwise(region), tokens) for tokens in (100_000, 1)]
    assert apart(parts[0][1], parts[1][1]) < 1e-5
    assert parts[0][0]["mean_loss"] == pytest.approx(parts[1][0]["mean_loss"], rel=1e-5)
    assert parts[0][0]["region"] == pytest.approx(parts[1][0]["region"], rel=1e-5)


def test_the_first_step_with_prox_takes_no_pass_more(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    scored = PolicyModule.logprobs

    def logprobs(self: PolicyModule, minibatch: Minibatch) -> Any:
        asked.append(minibatch.index)
        return scored(self, minibatch)

    monkeypatch.setattr(PolicyModule, "logprobs", logprobs)
    run = fit(policy, tmp_path, objective=pairwise(PairLoss()), composer=Pairs(), iterations=2)
    # There are two checks of the engine. Then, for each second minibatch, come prox, and the margins before its step.
    assert asked == [0, 0, *[1, 1] * 2]
    assert run.rows[0]["train/loss"] == pytest.approx(math.log(2), abs=0.05)


def test_sera_trains_with_all_it_has(policy: Path, tmp_path: Path) -> None:
    composer = SeRA(GroupReplayBuffer(), bootstrap=0.5, min_margin=0.01)
    run = fit(policy, tmp_path, objective=pairwise(PairLoss(0.1, "first")), composer=composer, iterations=4)
    first, *later = run.rows
    assert (first["pairs/margin"], first["pairs/accuracy"], first["pairs/bootstrapped_share"]) == (0, 0.5, 0)
    assert all(row["pairs/kept_margin"] > row["pairs/margin"] for row in later)
    assert sum(row["pairs/bootstrapped_share"] > 0 for row in later) >= 2
    logged = run.module.iteration_metrics
    assert logged["time/rescore"] > 0
    assert {name for name in logged if name.startswith(("time/", "pairs/"))} <= set(NAMES)


@pytest.mark.slow
def test_bootstrapping_resumes_in_a_run(config: Path, tmp_path: Path) -> None:
    """The waiting groups are in the checkpoint."""
    command = ["fit", "--config", config, *method("sera"), "--data.composer.bootstrap", "1"]
    command += ["--data.composer.min_margin", "0.001", "--evaluation.every_n_iterations", "0"]
    command += ["--evaluation.at_start", "false", "--checkpoint.every_n_epochs", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    popo(*command, "--trainer.max_epochs", "4", "--run.folder", whole)
    popo(*command, "--trainer.max_epochs", "2", "--run.folder", resumed)
    popo(*command, "--trainer.max_epochs", "4", "--run.folder", resumed, "--run.resume", "true")
    trained = [[row for row in metrics(folder) if "train/loss" in row] for folder in (whole, resumed)]
    assert trained[0] == trained[1] and len(trained[0]) == 4
    assert trained[0][2]["pairs/bootstrapped_share"] > 0


def test_groups_that_are_no_pairs_are_refused_without_the_command_line(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="gives a group of 4; use ReplayedPairs"):
        fit(policy, tmp_path, objective=pairwise(PairLoss()), iterations=1)


# -- several ranks -------------------------------------------------------------------------------------------------


def paired(seed: int, prompts: Sequence[int], index: int = 1) -> Minibatch:
    """Returns pairs with their own proximal log-probs."""
    groups = [as_pair(each, 2, 0) for each in rows_of(seed, prompts).groups]
    minibatch = Minibatch(groups, 2, index)
    draw = torch.Generator().manual_seed(seed)
    lengths = [len(r.token_ids) for r in minibatch.responses]
    minibatch.recorded["prox_logp"] = [-3 * torch.rand(length, generator=draw) for length in lengths]
    return minibatch


def joined(*minibatches: Minibatch) -> Minibatch:
    whole = Minibatch([group for each in minibatches for group in each.groups], 2, minibatches[0].index)
    whole.recorded["prox_logp"] = [logp for each in minibatches for logp in each.recorded["prox_logp"]]
    return whole


STEPS = [
    (paired(1, [2, 7, 1, 4]), paired(2, [4])),
    (paired(3, [3]), paired(4, [])),
    (paired(5, [6, 1]), paired(6, [2])),
]


def trained(folder: Path, strategy: str) -> dict[str, Any]:
    objective = pairwise(OPADPO(0.3, "first", opa=0.5))
    slots = vars(objective) | {"regularizers": []}
    module = PolicyModule(
        path=str(folder), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), micro_batch_tokens=20, **slots
    )
    steps = Steps()
    given = [(joined(*step),) for step in STEPS] if strategy == "one" else STEPS
    module, _ = train(module, strategy, given, [steps])
    weights = whole_tensors(module.named_parameters())
    return {"gradients": steps.gradients, "weights": weights}


def both_ways(folder: Path) -> list[dict[str, Any]]:
    return [trained(folder, "ddp"), trained(folder, "fsdp2")]


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    folder = random_model("llama-tied", tmp_path / "model")
    expected = trained(folder, "one")
    norms = [math.sqrt(sum(float(g.square().sum()) for g in step.values())) for step in expected["gradients"]]
    assert len(norms) == len(STEPS) and min(norms) > 0.01
    for rank in on_two_ranks(both_ways, tmp_path / "ranks", folder, seconds=300):
        for found in rank:
            for got, wanted in zip(found["gradients"], expected["gradients"], strict=True):
                torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)
            torch.testing.assert_close(found["weights"], expected["weights"], atol=2e-6, rtol=0)
