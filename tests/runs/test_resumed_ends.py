"""A resumed run has all that a finished run has. A fork, an evaluation and a second start replace nothing of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.test_command_line import digests
from evaluation.test_evaluation import written
from helpers.processes import on_two_ranks, trainer_of
from helpers.tiny_models import method, metrics, popo, popo_process

from popo_lightning.callbacks.run_keeper import RunKeeper
from popo_lightning.callbacks.summary import first_of
from popo_lightning.core.errors import SettingError
from popo_lightning.methods.mopps import MoPPS
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.critic import Critic
from popo_lightning.model.critic_heads import CategoricalHead, GaussianHead, ScalarHead, ValueHead
from popo_lightning.model.nested_head import NestedHead
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.rollout.rank_states import rules_of, without_other_rules
from popo_lightning.runs.record import new_record, read_record
from popo_lightning.tasks.samplers import EpochSampler

Args = list[str | Path]
ITERATIONS = 3  # evaluated after 0, 2 and, at the end, 3


@pytest.fixture(scope="module")
def command(config: Path) -> Args:
    often = ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
    return ["fit", "--config", config, *method("grpo"), *often, "--trainer.max_epochs", str(ITERATIONS)]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def whole(command: Args, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a finished run whose checkpoints are not in its folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    popo(*command, "--run.folder", folder, "--checkpoint.dirpath", elsewhere)
    return folder


def summary(folder: Path) -> dict[str, Any]:
    """Returns the summary without values that vary from run to run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    evaluated = [found["first_evaluation"] or {}, found["last_evaluation"], *found["evaluations"]]
    for entry in (found, *evaluated):
        for name in [name for name in entry if name.endswith("seconds")]:
            del entry[name]
    return found


def assert_whole(folder: Path, whole: Path) -> None:
    assert metrics(folder) == metrics(whole)
    assert written(folder / "evaluations") == written(whole / "evaluations")
    assert summary(folder) == summary(whole)


def saved_settings(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Returns settings in config.yaml that would mislead a later command if they named this command's choices."""
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    folders = (saved["checkpoint"]["dirpath"], saved["trainer"]["default_root_dir"], saved["run"]["folder"])
    return saved["ckpt_path"], *folders


def without_last_row(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))


@pytest.mark.parametrize("row_written", [False, True])
def test_killed_during_the_last_evaluation(
    command: Args, whole: Path, tmp_path: Path, row_written: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The last checkpoint exists, but not the evaluation. In the other case only the summary is missing."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / "summary.json").unlink()
    if not row_written:
        assert metrics(folder)[-1]["step"] == ITERATIONS and "eval/countdown/greedy" in metrics(folder)[-1]
        without_last_row(folder / "metrics.csv")
        shutil.rmtree(folder / "evaluations" / f"iteration-{ITERATIONS:06d}")
    popo(*command, "--run.folder", folder, "--run.resume", "true")
    assert_whole(folder, whole)
    assert "what is left is the last evaluation and summary.json" in caplog.text
    assert saved_settings(folder) == (None, None, None, str(folder))


@pytest.mark.slow
def test_killed_during_the_last_evaluation_in_a_process_of_its_own(command: Args, whole: Path, tmp_path: Path) -> None:
    kill = [
        "--trainer.callbacks+",
        "helpers.tiny_models.KillInEvaluation",
        "--trainer.callbacks.iteration",
        str(ITERATIONS),
    ]
    killed = popo_process(*command, *kill, "--run.folder", tmp_path)
    assert killed.returncode < 0, killed.stderr
    assert not (tmp_path / "summary.json").exists() and metrics(tmp_path) == metrics(whole)[:-1]
    resumed = popo_process(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert resumed.returncode == 0 and "what is left is the last evaluation" in resumed.stderr
    assert_whole(tmp_path, whole)
    again = popo_process(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert again.returncode == 0 and "is finished (3 iterations" in again.stderr


def test_a_finished_run_is_left_as_it_is(command: Args, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(whole)
    with pytest.raises(SystemExit) as stopped:
        popo(*command, "--run.folder", whole, "--run.resume", "true")
    assert stopped.value.code == 0
    assert "is finished (3 iterations" in capsys.readouterr().err.splitlines()[-1]
    assert digests(whole) | {"run.lock": ""} == before | {"run.lock": ""}


def test_a_fork_with_another_rule_starts_with_what_there_is(
    config: Path,
    whole: Path,
    elsewhere: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """POPO starts from GRPO's checkpoint, which has no buffer, in its own folder. The first run does not change."""
    before, kept = digests(whole), digests(elsewhere)
    (newest,) = elsewhere.glob(f"iteration-{ITERATIONS:04d}.ckpt")
    longer = ["--trainer.max_epochs", str(ITERATIONS + 1), "--run.root", tmp_path, "--ckpt_path", newest]
    popo("fit", "--config", config, *method("popo"), *longer)
    assert (digests(whole), digests(elsewhere)) == (before, kept)
    fork = tmp_path / "tiny" / "popo-seed1"
    assert {row["step"] for row in metrics(fork)} == {ITERATIONS + 1}
    assert summary(fork)["method"] == "popo" and summary(fork)["iterations"] == ITERATIONS + 1
    record = read_record(fork)
    assert record is not None and record.origin == {"checkpoint": str(newest), "iterations": ITERATIONS}
    assert saved_settings(fork) == (str(newest), None, None, str(fork))
    assert "method grpo there, popo here" in capsys.readouterr().err
    assert "data.composer is popo_lightning.methods.popo.PrioritizedGroupReplay; the checkpoint's is" in caplog.text


def test_a_runs_own_config(whole: Path, elsewhere: Path, tmp_path: Path) -> None:
    """It validates the run's newest checkpoint, replaces nothing, and runs again unchanged in another folder."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    own = ["--config", folder / "config.yaml", "--run.folder", folder]
    before = digests(folder)
    popo("validate", *own)
    after = digests(folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("evaluations/validate/") for name in after.keys() - before.keys())
    found, there = (
        json.loads((folder / "evaluations" / name / "results.json").read_text())
        for name in ("validate", f"iteration-{ITERATIONS:06d}")
    )
    (newest,) = elsewhere.glob(f"iteration-{ITERATIONS:04d}.ckpt")
    assert found["checkpoint"] == str(newest) and found["iteration"] == ITERATIONS
    numbers = [each["benchmarks"]["countdown"]["numbers"] for each in (found, there)]
    assert numbers[0] | {"seconds": 0} == numbers[1] | {"seconds": 0}
    kept = digests(elsewhere)
    popo("fit", "--config", folder / "config.yaml", "--run.folder", tmp_path / "again", "--checkpoint.dirpath", "null")
    assert metrics(tmp_path / "again") == metrics(whole) and digests(elsewhere) == kept


def test_the_first_evaluation_is_no_last_one() -> None:
    start, end = {"iteration": 0, "eval/x/greedy": 0.25}, {"iteration": 5, "eval/x/greedy": 0.5}
    assert first_of([]) is None and first_of([end]) is None
    assert first_of([start]) == first_of([start, end]) == start
    assert first_of([end, end | {"iteration": 9}]) == end


def test_states_of_other_rules_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    epochs, replay = EpochSampler(), PrioritizedGroupReplay(GroupReplayBuffer(4))
    states = [{"sampler": {"cursor": 7}, "composer": {}, "pending": [], "rollout_metrics": {}, "groups_made": 3}]
    there = rules_of(epochs, OnPolicy(), "abc")
    assert without_other_rules(states, there, there) == states
    assert without_other_rules(states, None, there) == states  # of an earlier version
    assert not caplog.text
    (found,) = without_other_rules(states, there, rules_of(epochs, replay, "abc"))
    assert found | {"composer": {}} == states[0] and "composer" not in found
    assert "data.composer is" in caplog.text and "data.sampler" not in caplog.text
    (found,) = without_other_rules(states, there, rules_of(MoPPS(), OnPolicy(), "abc"))
    assert "sampler" not in found and found["composer"] == {}
    (found,) = without_other_rules(states, there, rules_of(epochs, OnPolicy(), "abd"))
    assert not {"sampler", "composer"} & found.keys() and "data.task has other problems" in caplog.text


@pytest.mark.parametrize("critic", [False, True])
def test_a_checkpoint_with_or_without_a_critic(critic: bool) -> None:
    alone = {"policy_shapes": {"model.a": [1]}, "policy_frozen": []}
    both = {"policy_shapes": {"model.a": [1], "value_model.a": [1]}, "policy_frozen": []}
    own, saved = (both, alone) if critic else (alone, both)
    with pytest.raises(SettingError, match=f"model.critic is {'set' if critic else 'null'}, but the checkpoint"):
        policy_checkpoint.check(own, saved, "a model", training=True, freeze_vision=False)
    policy_checkpoint.check(own, own, "a model", training=True, freeze_vision=False)


HEADS: list[tuple[ValueHead, ValueHead, str]] = [
    (NestedHead("level", ["1", "2"]), NestedHead("level", ["2", "1"]), r"groups \['2', '1'\], but"),
    (NestedHead("level", ["1"]), NestedHead("kind", ["1"]), "field kind, but the checkpoint's level"),
    (CategoricalHead(), CategoricalHead(high=2.0), r"high 2\.0, but the checkpoint's 1\.0"),
    (ScalarHead(), GaussianHead(), "class GaussianHead, but the checkpoint's ScalarHead"),
]


@pytest.mark.parametrize(("there", "here", "said"), HEADS)
def test_a_checkpoint_whose_critic_has_a_head_of_another_meaning(there: ValueHead, here: ValueHead, said: str) -> None:
    """The heads have equal shapes, such as twin scalar heads and a Gaussian one."""

    class Policy(torch.nn.Module):
        def __init__(self, head: ValueHead) -> None:
            super().__init__()
            self.model, self.critic = torch.nn.Linear(1, 1), Critic(head=head, value_clip=None)

    saved, own = (policy_checkpoint.describe(Policy(head)) for head in (there, here))
    with pytest.raises(SettingError, match=f"model.critic.head has {said}"):
        policy_checkpoint.check(own, saved, "a model", training=True, freeze_vision=False)
    policy_checkpoint.check(own, own, "a model", training=True, freeze_vision=False)
    del saved[policy_checkpoint.HEAD]  # of an earlier version
    policy_checkpoint.check(own, saved, "a model", training=True, freeze_vision=False)


def adopted(folder: Path) -> tuple[str, str]:
    """Returns a rank's folder before and after. Each rank has chosen another one."""
    trainer = trainer_of("ddp", 2, 1)
    trainer.strategy.setup_environment()
    own = folder / f"run-{trainer.global_rank + 1}"
    trainer._default_root_dir = str(own)  # type: ignore[attr-defined]
    RunKeeper(new_record("t", "m", 1, {}, 20), lambda path: None).setup(trainer, None, "fit")
    return str(own), trainer.default_root_dir


def test_all_ranks_take_the_folder_that_rank_0_has_claimed(tmp_path: Path) -> None:
    found = on_two_ranks(adopted, tmp_path / "answers", tmp_path)
    assert [own for own, _ in found] == [str(tmp_path / "run-1"), str(tmp_path / "run-2")]
    assert {taken for _, taken in found} == {str(tmp_path / "run-1")}
