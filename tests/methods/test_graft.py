"""GRAFT: which groups a peer's replace, with which responses and advantages, and when they are trained on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import group, ids, iteration, response
from helpers.tiny_models import fit, method, metrics, popo, tiny_task
from torch import Tensor

from popo_lightning.cli.combinations import check_combination
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import split_minibatches
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.graft import GRAFT, compatibility
from popo_lightning.methods.max_at_k import MaxAtK
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.policy import PolicyModule
from popo_lightning.replay.recorded_groups import RecordGroups, own_file, recorded_groups, row_of

ROOT2 = 0.7071068  # (1 - 1/2) / std of (0, 1), which is sqrt(1/2), except for 1e-6


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def peer(problem: str = "problem 0", scores: Sequence[float] = (1.0, 0.0), tokens: int = 2, **changes: Any) -> Any:
    """Returns a row of a peer whose log-probs are -0.5 at every token."""
    responses = [response([1] * tokens, score=score) for score in scores]
    return row_of(replace(group(3, 1, problem), responses=responses)) | changes


def asked(fresh: Sequence[Group], logp: float = -0.5, **changes: Any) -> Any:
    """Returns an iteration whose policy gives every token of a peer the same log-prob."""

    def present(groups: Sequence[Group]) -> list[list[Tensor]]:
        return [[torch.full((len(one.token_ids),), logp) for one in each.responses] for each in groups]

    return iteration(5, fresh, present_logprobs=present, **changes)


FAILED, MIXED, SOLVED = (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)


def test_a_failed_group_gives_way_to_a_peers(tmp_path: Path) -> None:
    fresh = [
        group(0, 5, scores=FAILED),
        group(1, 5, scores=MIXED),
        group(2, 5, scores=SOLVED),
        group(3, 5, scores=FAILED),
    ]
    # Every problem except the last has a peer's group.
    composer = GRAFT([written(tmp_path / "peers", *(peer(f"problem {place}") for place in range(3)))])
    composed = composer.compose(asked(fresh))
    assert ids(composed) == [1, 2, 3, -1]
    grafted = composed[-1]
    assert grafted.problem == fresh[0].problem and grafted.version == 4 and not grafted.prefix_tokens
    assert [one.parts["score"] for one in grafted.responses] == [1.0, 0.0]
    assert all(one.behave_logp.tolist() == [-0.5, -0.5] for one in grafted.responses)
    torch.testing.assert_close(grafted.advantages, torch.tensor([ROOT2, -ROOT2]), atol=1e-5, rtol=0)
    assert composer.report() == {"replay/grafted_groups": 1.0, "replay/left_out_responses": 0.0}
    assert set(composer.trained_last()) == {-1}


def test_a_success_is_what_the_setting_says(tmp_path: Path) -> None:
    """The reward does not decide: a group of wrong responses with a reward for their format has failed too."""
    path = written(tmp_path / "peers", peer())
    fresh = [group(0, 5, scores=(0.1, 0.0), accs=FAILED)]
    assert ids(GRAFT([path]).compose(asked(fresh))) == [-1]
    assert ids(GRAFT([path], success_key="score", success_above=0.05).compose(asked(fresh))) == [0]


def test_compatibility_by_hand() -> None:
    # The ratios 4 and 1/16 have the product 1/4, whose root is 1/2.
    logs = torch.tensor([4.0, 1 / 16]).log()
    assert compatibility(logs - 0.5, torch.full((2,), -0.5)) == pytest.approx(0.5)
    assert compatibility(torch.tensor([-100.0]), torch.zeros(1)) == pytest.approx(math.exp(-20))


def test_the_gate_leaves_out_responses_and_keeps_the_sources_advantages(tmp_path: Path) -> None:
    # The peer's log-probs are -0.5. The policy's are -1.2 (a ratio of 0.497) for one response and -1.1 (0.549) for the
    # others.
    path = written(tmp_path / "peers", peer(scores=(1.0, 0.0, 0.0)))

    def present(groups: Sequence[Group]) -> list[list[Tensor]]:
        return [[torch.full((2,), -1.1), torch.full((2,), -1.2), torch.full((2,), -1.1)] for _ in groups]

    composer = GRAFT([path])
    fresh = [group(0, 5, scores=FAILED)]
    (grafted,) = composer.compose(iteration(5, fresh, present_logprobs=present))
    # The rewards are 1, 0, 0: mean 1/3, std sqrt(1/3).
    root = math.sqrt(3.0)
    torch.testing.assert_close(grafted.advantages, torch.tensor([2 / 3 * root, -1 / 3 * root]), atol=1e-5, rtol=0)
    assert [one.parts["score"] for one in grafted.responses] == [1.0, 0.0]
    assert composer.report()["replay/left_out_responses"] == 1
    assert ids(GRAFT([path], min_ratio=0.0).compose(asked(fresh, -9.0))) == [-1]
    # If the policy could write none of the responses, the fresh group stays.
    composer = GRAFT([path], min_ratio=0.55)
    assert ids(composer.compose(asked(fresh, -1.1))) == [0]
    assert composer.report() == {"replay/grafted_groups": 0.0, "replay/left_out_responses": 3.0}
    assert not composer.trained_last()


def test_responses_longer_than_the_runs_are_left_out(tmp_path: Path) -> None:
    """They are left out before scoring, because a file may have a response that is too long for a pass."""
    row = peer(scores=(1.0, 0.0, 0.0))
    row["responses"][1] = peer(tokens=5)["responses"][1]
    composer, fresh = GRAFT([written(tmp_path / "peers", row)]), [group(0, 5, scores=FAILED)]
    (whole,) = composer.compose(asked(fresh, max_new_tokens=5))
    assert len(whole.responses) == 3

    def present(groups: Sequence[Group]) -> list[list[Tensor]]:
        assert all(len(one.token_ids) == 2 for each in groups for one in each.responses)
        return [[one.behave_logp for one in each.responses] for each in groups]

    (cut,) = composer.compose(iteration(5, fresh, present_logprobs=present, max_new_tokens=4))
    assert whole.advantages is not None and cut.advantages is not None
    assert torch.equal(cut.advantages, whole.advantages[[0, 2]])
    assert composer.report()["replay/left_out_responses"] == 1
    assert ids(composer.compose(iteration(5, fresh, max_new_tokens=1))) == [0]
    assert composer.report()["replay/left_out_responses"] == 3


def test_groups_that_teach_nothing_are_no_peers(tmp_path: Path) -> None:
    path = written(tmp_path / "peers", peer(scores=FAILED), peer("problem 1"))
    assert ids(GRAFT([path]).compose(asked([group(0, 5, scores=FAILED)]))) == [0]
    dull = written(tmp_path / "dull", peer(scores=SOLVED))
    with pytest.raises(SettingError, match=r"without a group that has a right response"):
        GRAFT([dull])


def test_one_of_several_peers_is_drawn(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, peer(), peer(group=4)) for name in ("one", "other"))
    composer, fresh = GRAFT([one, other]), [group(0, 5, scores=FAILED)]
    drawn = {ids(composer.compose(asked(fresh, seeded=lambda *_, n=n: Random(n))))[0] for n in range(40)}
    assert drawn == {-1, -2, -3, -4}
    assert ids(composer.compose(asked(fresh))) == ids(composer.compose(asked(fresh)))


def test_other_prompts_and_other_tokens_are_refused(tmp_path: Path) -> None:
    fresh = [group(0, 5, scores=FAILED)]
    other = GRAFT([written(tmp_path / "other", peer(prompt_ids=[4, 6]))])
    with pytest.raises(SettingError, match=r"^GRAFT.peers has other prompt tokens for problem 'problem 0' than this"):
        other.compose(asked(fresh))
    known = GRAFT([written(tmp_path / "known", peer())])
    assert ids(known.compose(asked(fresh, vocab_size=2))) == [-1]
    with pytest.raises(SettingError, match=r"^GRAFT.peers has token 1 in .* but the policy knows 1 tokens"):
        known.compose(asked(fresh, vocab_size=1))


def test_without_peers_it_is_grpo(caplog: pytest.LogCaptureFixture) -> None:
    fresh = [group(0, 0, scores=FAILED), group(1, 0)]
    assert ids(GRAFT().compose(iteration(0, fresh))) == [0, 1]
    assert "GRAFT has no groups of a peer (data.composer.peers)" in caplog.text


# -- the file


def test_a_group_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = replace(
        group(3, 7), responses=[response([5, 2], [-0.25, -1.5], 1.0), response([3], [-0.5], finish_reason="length")]
    )
    ((found,),) = recorded_groups([written(tmp_path / "file", row_of(one))], "x").values()
    assert found.id == -1 and found.problem.id == "problem 3" and found.prompt_ids.tolist() == [4, 5]
    for got, wanted in zip(found.responses, one.responses, strict=True):
        assert torch.equal(got.token_ids, wanted.token_ids) and torch.equal(got.behave_logp, wanted.behave_logp)
        assert (got.parts, got.finish_reason, got.text) == (wanted.parts, wanted.finish_reason, wanted.text)


def test_an_iteration_written_twice_counts_once(tmp_path: Path) -> None:
    """A run that was resumed from an earlier point writes an iteration twice. Each row without a number counts."""
    again = peer(scores=(0.0, 1.0))
    path = written(tmp_path / "file", peer(), peer(iteration=2), again)
    found = recorded_groups([path], "x")["problem 0"]
    assert [each.rewards().tolist() for each in found] == [[0.0, 1.0], [1.0, 0.0]]
    plain = {key: value for key, value in peer().items() if key not in ("iteration", "group")}
    assert len(recorded_groups([written(tmp_path / "plain", plain, plain)], "x")["problem 0"]) == 2


def changed(**changes: Any) -> Any:
    row = peer()
    row["responses"][0] |= changes
    return row


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "cannot be read as JSON lines: line 2 is none (Expecting property name"),
        ("[1]", "line 2 is none (no JSON object); delete that line"),
        ("[" * 100_000, "cannot be read as JSON lines: line 2"),
        (b"\x80\x04K\x01.", "cannot be read as JSON lines: line 1"),  # a pickle
        ({}, "line 2 is no recorded group (KeyError 'problem')"),
        (peer(problem=1), "its problem is no text"),
        (peer(prompt_ids="45"), "prompt_ids are no token ids"),
        (peer(prompt_ids=[]), "it has no prompt"),
        (peer(images=["a.png"]), "a prompt with images"),
        (peer(responses={}), "fewer than two responses"),
        (peer(scores=[1.0]), "fewer than two responses"),
        (changed(token_ids=[1, -1]), "token_ids are no token ids"),
        (changed(token_ids=[1, True]), "token_ids are no token ids"),
        (changed(token_ids=[1, 2**70]), "is no recorded group"),
        (changed(token_ids=[], behave_logp=[]), "a response without tokens"),
        (changed(behave_logp=[-0.5]), "one behavior log-prob per token"),
        (changed(behave_logp="-1"), "without log-probs"),
        (changed(behave_logp=[-0.5, 0.5]), "no log-probs"),
        (changed(behave_logp=[-0.5, math.nan]), "no log-probs"),
        (changed(behave_logp=[-0.5, None]), "is no recorded group"),
        (changed(parts={"score": "1"}), "a reward that is no number"),
        (changed(parts={"score": math.inf, "acc": 0.0}), "a reward that is not finite"),
        (changed(parts={"score": 1e39, "acc": 0.0}), "a reward that is not finite in float32"),
        (changed(parts={"score": 1.0}), "a response without score or acc"),
        (changed(parts={}), "a response without score or acc"),
        (changed(parts=[1.0]), "is no recorded group"),
        (changed(finish_reason="error"), "a finish_reason other than stop and length"),
    ],
)
def test_a_strangers_file_is_one_sentence(row: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.jsonl"
    if isinstance(row, bytes):
        path.write_bytes(row)
    else:
        written(path, peer(), row)
    with pytest.raises(SettingError) as caught:
        GRAFT([str(path)])
    assert sentence in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^GRAFT.peers names '.*none.jsonl', which is no file; name one that"):
        GRAFT([str(tmp_path / "none.jsonl")])
    with pytest.raises(SettingError, match=r"^GRAFT.min_ratio is 1.5"):
        GRAFT(min_ratio=1.5)
    with pytest.raises(SettingError, match=r"^RecordGroups.path is empty"):
        RecordGroups(" ")
    with pytest.raises(SettingError, match=r"^RecordGroups.path is '/dev/null/x', which cannot be written"):
        RecordGroups("/dev/null/x").compose(iteration(0, [group(0)]))


def test_a_line_that_a_killed_run_left_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "peers.jsonl"
    RecordGroups(str(path)).compose(iteration(0, [group(0), group(1)]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    RecordGroups(str(path)).compose(iteration(1, [group(2)]))
    with pytest.raises(SettingError, match=r"line 2 is none .*; delete that line"):
        recorded_groups([str(path)], "x")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    assert sum(map(len, recorded_groups([str(path)], "x").values())) == 2


def test_each_group_that_is_read_has_a_number_of_its_own(tmp_path: Path) -> None:
    rows = [peer("a", iteration=1), peer("b"), peer("a", iteration=1), peer("c")]
    found = recorded_groups([written(tmp_path / "peers", *rows)], "x")
    assert len({one.id for groups in found.values() for one in groups}) == 3


def test_a_peer_that_was_never_right_has_nothing_to_graft(tmp_path: Path) -> None:
    """Its rewards may differ nevertheless, for example by a length penalty."""
    row = peer(scores=(-0.5, 0.0))
    for one in row["responses"]:
        one["parts"] |= {"acc": 0.0}
    with pytest.raises(SettingError, match=r"without a group that has a right response \('acc' above 0.5\)"):
        GRAFT([written(tmp_path / "wrong", row)])
    fresh = [group(0, 5, scores=FAILED)]
    (grafted,) = GRAFT([written(tmp_path / "both", row, peer(iteration=9))]).compose(asked(fresh))
    assert [one.parts["score"] for one in grafted.responses] == [1.0, 0.0]


def test_each_rank_has_a_file(tmp_path: Path) -> None:
    assert own_file(tmp_path / "peers.jsonl", 0, 1).name == "peers.jsonl"
    assert own_file(tmp_path / "peers.jsonl", 1, 2).name == "peers.rank1-of-2.jsonl"


# -- minibatches


def test_peers_come_in_the_last_minibatches() -> None:
    groups = [group(number) for number in (0, 1, 2, 3, -1, -2, -3)]
    parts = [each.groups for each in split_minibatches(groups, 0, 3, 2, Random(1), {-1, -2, -3})]
    assert [len(part) for part in parts] == [3, 2, 2] * 2
    assert [sorted(each.id < 0 for each in part) for part in parts[:3]] == [[False] * 3, [False, True], [True] * 2]
    assert [ids(part) for part in parts[:3]] == [ids(part) for part in parts[3:]]
    assert {each.id for part in parts[:3] for each in part} == {each.id for each in groups}
    # The order within a part is that of the shuffle. Without groups that come last, nothing changes.
    order = list(range(7))
    Random(1).shuffle(order)
    fresh = [groups[place].id for place in order if groups[place].id >= 0]
    assert [number for part in parts[:3] for number in ids(part) if number >= 0] == fresh
    plain = split_minibatches(groups, 0, 3, 1, Random(1))
    assert [ids(part.groups) for part in plain] == [[groups[i].id for i in order[part::3]] for part in range(3)]


# -- runs


def test_a_weight_that_takes_peers_for_the_policy_is_refused() -> None:
    data = RolloutDataModule(tiny_task(), TransformersEngine(), GRAFT())
    with pytest.raises(SettingError, match=r"^data.composer is GRAFT, which trains on what other models sampled"):
        check_combination(PolicyModule(path="none", behave_weight=NoCorrection()), data, [])
    with pytest.raises(SettingError, match=r"^data.composer is GRAFT, which trains on what other models sampled"):
        # An advantage's own weight does not reach groups whose advantages the composer fixes.
        check_combination(
            PolicyModule(path="none", behave_weight=NoCorrection(), advantage=MaxAtK(2, off_policy=True)), data, []
        )
    check_combination(PolicyModule(path="none"), data, [])
    aligned = PolicyModule(path="none", behave_weight=NoCorrection(), trust_region=BehaveAligned())
    check_combination(aligned, data, [])


def test_a_run_grafts_what_another_recorded_and_resumes_exactly(config: Path, tmp_path: Path) -> None:
    peers = tmp_path / "peers.jsonl"
    common = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", 0, "--evaluation.samples", 0]
    record = ["fit", "--config", config, *method("grpo"), *common, "--data.composer", "RecordGroups"]
    record += ["--data.composer.path", peers, "--model.optimizer.init_args.lr", 0, "--trainer.max_epochs", 6]
    popo(*map(str, record), "--data.group_size", "8", "--seed_everything", "3", "--run.folder", tmp_path / "peer")
    rows = [json.loads(line) for line in peers.read_text().splitlines()]
    assert len(rows) > 10 and all(len(row["responses"]) == 8 for row in rows)
    assert all(len({one["parts"]["score"] for one in row["responses"]}) > 1 for row in rows)

    command = ["fit", "--config", config, *method("graft"), *common, "--data.composer.peers", json.dumps([str(peers)])]
    command += ["--trainer.max_epochs", 4, "--checkpoint.every_n_epochs", 1, "--checkpoint.save_top_k", -1]
    command += ["--model.optimizer.init_args.lr", 5e-4]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    popo(*map(str, command), "--run.folder", whole)
    rows = [row for row in metrics(whole) if "train/loss" in row]
    assert len(rows) == 4 and sum(row["replay/grafted_groups"] for row in rows) > 0
    assert all(row["replay/groups"] == row["replay/grafted_groups"] for row in rows)
    # The peer is the policy at its start, so at first its responses are as likely as the policy's own.
    assert rows[0]["replay/left_out_responses"] == 0
    shutil.copytree(whole, resumed)
    (resumed / "checkpoints" / "iteration-0004.ckpt").unlink()
    popo(*map(str, command), "--run.folder", resumed, "--run.resume", "true")
    assert metrics(resumed) == metrics(whole)
    left, right = (
        torch.load(folder / "checkpoints" / "iteration-0004.ckpt", weights_only=True)["state_dict"]
        for folder in (resumed, whole)
    )
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_the_weight_of_a_peers_group_is_to_the_peer(policy: Path, tmp_path: Path) -> None:
    """The peer gave its responses half the probability that the policy gives them, so TruncatedIS weights are 2."""
    path = tmp_path / "peers.jsonl"
    recorder = RecordGroups(str(path))
    fit(
        policy,
        tmp_path / "peer",
        composer=recorder,
        iterations=6,
        lr=0.0,
        group_size=8,
        problems_per_iteration=20,
        seed=3,
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for one in row["responses"]:
            one["behave_logp"] = [value - math.log(2.0) for value in one["behave_logp"]]
    run = fit(policy, tmp_path / "run", composer=GRAFT([written(path, *rows)]), iterations=3, lr=0.0)
    grafted = [row for row in run.rows if row["replay/grafted_groups"]]
    assert grafted
    for row in grafted:
        assert row["weight/replayed_mean"] == pytest.approx(2, abs=1e-4)
        assert row["weight/fresh_mean"] == pytest.approx(1, abs=1e-4)
