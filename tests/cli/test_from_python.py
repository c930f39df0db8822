"""Training from a script or a notebook, by `popo_lightning.fit` or by Lightning's own trainer."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.forked import run_forked
from helpers.rewards import longest
from helpers.tiny_models import TASK, SignalAt, environment, metrics, popo, tiny_task
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim import AdamW

import popo_lightning
from popo_lightning.callbacks.closing_block import longer
from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.core.errors import SettingError
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.ppo_ewma import ProximalAverage
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.proximal.critic_values import CriticValues
from popo_lightning.proximal.snapshot import ProximalPolicy, ProximalSnapshot
from popo_lightning.replay.buffer import GroupReplayBuffer

SHORT = {"trainer": {"max_epochs": 2}, "evaluation": {"every_n_iterations": 0, "at_start": False}}


def weights(policy: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in policy.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_package_alone_is_light() -> None:
    code = "import sys, popo_lightning; popo_lightning.SettingError; print([m for m in ('torch', 'vllm', 'lightning')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert popo_lightning.SettingError is SettingError
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        popo_lightning.fti  # noqa: B018


def test_fit_twice_is_the_command(config: Path, tmp_path: Path) -> None:
    """In one process, nested and dotted settings give the same weights and numbers as `popo fit`."""
    cli = popo("fit", "--config", config, "--config", "method/popo", "--trainer.max_epochs", "2",
               "--evaluation.every_n_iterations", "0", "--evaluation.at_start", "false",
               "--run.folder", tmp_path / "command")  # fmt: skip
    dotted = {"trainer.max_epochs": 2, "evaluation.every_n_iterations": 0, "evaluation.at_start": False}
    first = popo_lightning.fit(config, "popo", run={"folder": tmp_path / "first"}, **SHORT)
    second = popo_lightning.fit(configs=[config, "method/popo"], **{"run.folder": tmp_path / "second", **dotted})
    assert equal(weights(first.policy), weights(cli.model)) and equal(weights(second.policy), weights(cli.model))
    assert metrics(tmp_path / "command") == metrics(first.folder) == metrics(second.folder)
    assert first.folder == tmp_path / "first" and first.summary["iterations"] == 2
    assert [row["step"] for row in first.metrics if "train/loss" in row] == [1, 2]
    assert {"train/loss", "eval/countdown/greedy"} <= first.metrics[-1].keys()
    assert len({row["step"] for row in first.metrics}) == len(first.metrics)  # evaluations are in rows of iterations
    assert first.trainer.global_step == first.summary["optimizer_steps"] > 0
    assert popo_lightning.validate(configs=[first.folder / "config.yaml"], evaluation={"samples": 2}).keys() >= {
        "eval/countdown/greedy"
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "countdown_tyni"}, "task is 'countdown_tyni', .*did you mean countdown_tiny?"),
    "method": ({"task": "countdown_tiny", "method": "pop"}, "method is 'pop', .*did you mean popo?"),
    "name": ({"task": "countdown_tiny", "data": {"grupo_size": 3}}, "grupo_size"),
    "dotted": ({"task": "countdown_tiny", "data.group_size": "many"}, "data.group_size"),
    "value": ({"task": "countdown_tiny", "data.group_size": 0}, "data.group_size is 0"),
    "object": (
        {"task": "countdown_tiny", "trainer.callbacks": [EarlyStopping("x")]},
        r"trainer.callbacks\[0\] is a Early",
    ),
    "configs": ({"configs": "countdown_tiny"}, "give a list"),
    "nothing": ({}, r'task is None, .* as popo_lightning.fit\("countdown_tiny", "popo"\)'),
    "no task": ({"method": "popo"}, "task is None, but a run needs one; name it"),
    "plan": ({"task": "countdown_tiny", "plan": True}, r"plan is True, .* by popo fit \.\.\. --plan"),
    "card": ({"task": "countdown_tiny", "card_gib": 80}, "card_gib is 80, .* takes settings alone; leave it out"),
    "lambda": ({"task": "countdown_tiny", "reward": lambda text: 1.0}, "define it by def"),
    "number": ({"task": "countdown_tiny", "reward": 3}, "reward is int"),
    "address": ({"task": "countdown_tiny", "reward": "gone.py:shout"}, "there is no file gone.py"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_raised(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = REFUSED[name]
    with pytest.raises(popo_lightning.SettingError, match=words) as raised:
        popo_lightning.fit(**given)
    assert "\n" not in str(raised.value) and not capsys.readouterr().err


def test_a_finished_run_is_said(config: Path, tmp_path: Path) -> None:
    popo_lightning.fit(config, "popo", run={"folder": tmp_path / "run"}, **SHORT)
    with pytest.raises(SettingError, match="iterations"):
        popo_lightning.fit(config, "popo", run={"folder": tmp_path / "run", "resume": True}, **SHORT)


@pytest.mark.slow
def test_a_function_as_the_reward(config: Path, tmp_path: Path) -> None:
    """The function replaces the embedded task's own verifier."""
    found = popo_lightning.fit(config, "popo", reward=longest, run={"folder": tmp_path / "run"}, **SHORT)
    assert all(row["reward/score"] > 2 for row in found.metrics if "train/loss" in row)
    assert "helpers.rewards:longest" in (tmp_path / "run" / "config.yaml").read_text()
    command = longer(found.trainer, found.folder)
    assert command is not None and command.startswith("popo fit --config ")
    popo(*shlex.split(command)[1:])  # trains on by the same reward
    trained = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4] and all(row["reward/score"] > 2 for row in trained)


@pytest.mark.slow
def test_a_function_of_a_script(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("cloudpickle")
    (tmp_path / "script.py").write_text(
        f"import popo_lightning\nBONUS = 7.0\ndef bonus(text):\n    return BONUS + len(text)\n"
        f"run = popo_lightning.fit({str(config)!r}, 'popo', reward=bonus, run={{'folder': 'run'}}, **{SHORT!r})\n"
        "print('SCORE', run.metrics[0]['reward/score'])\n"
    )
    done = run_forked(["script.py"], environment(), cwd=tmp_path)
    assert "SCORE" in done.stdout and float(done.stdout.rpartition("SCORE ")[2]) > 9, done.stderr
    assert "export" in done.stderr and "train on" not in done.stderr  # no command finds the script's function


@pytest.mark.slow
def test_a_script_without_cloudpickle_is_told(tmp_path: Path) -> None:
    (tmp_path / "cloudpickle.py").write_text("raise ImportError('none')\n")
    (tmp_path / "script.py").write_text(
        "import popo_lightning\ndef bonus(text):\n    return 1.0\n"
        "try:\n    popo_lightning.fit('countdown_tiny', 'popo', reward=bonus)\n"
        "except popo_lightning.SettingError as error:\n    print('SAID', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert "SAID data.task.verifier is __main__:bonus" in done.stdout and "put the function into a file" in done.stdout


def test_control_c_is_a_keyboard_interrupt(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    stops = {"class_path": "helpers.tiny_models.SignalAt", "init_args": {"hook": "on_train_batch_end", "iteration": 1}}
    assert SignalAt is not None
    with pytest.raises(KeyboardInterrupt):
        popo_lightning.fit(
            config,
            "popo",
            run={"folder": tmp_path / "run"},
            **{**SHORT, "trainer": {"max_epochs": 2, "callbacks": [stops]}},
        )
    assert signal.getsignal(signal.SIGINT) is handler
    found = popo_lightning.fit(config, "popo", run={"folder": tmp_path / "run", "resume": True}, **SHORT)
    assert found.summary["iterations"] == 2


def lightning_fit(policy: Path, folder: Path, *callbacks: L.Callback) -> Any:
    """Trains as a user of Lightning would, with the configuration of tests/helpers written by hand."""
    L.seed_everything(1, verbose=False)
    module = popo_lightning.PolicyModule(
        path=str(policy),
        behave_weight=TruncatedIS(cap=2.0),
        optimizer=lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.0),
    )
    data = popo_lightning.RolloutDataModule(
        tiny_task(), TransformersEngine(), PrioritizedGroupReplay(GroupReplayBuffer(max_age=8)),
        problems_per_iteration=9, group_size=4, minibatches=3, max_new_tokens=10, max_prompt_tokens=16,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, callbacks=list(callbacks), default_root_dir=folder
    )
    trainer.fit(module, data)
    return trainer


def test_lightnings_trainer_is_the_command(policy: Path, config: Path, tmp_path: Path) -> None:
    """The weights are equal bit for bit, although the trainer was not given a proximal policy."""
    assert os.environ["POPO_CACHE"] and TASK
    found = popo_lightning.fit(config, "popo", run={"folder": tmp_path / "run"}, **SHORT)
    trainer = lightning_fit(policy, tmp_path / "own")
    assert equal(weights(trainer.lightning_module), weights(found.policy))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds[:3] == [Monitor, ProximalSnapshot, CriticValues]
    assert trainer.lightning_module.iteration_metrics["replay/groups"] >= 0


def test_nothing_is_supplied_twice(policy: Path, config: Path, tmp_path: Path) -> None:
    found = popo_lightning.fit(config, "popo", run={"folder": tmp_path / "run"}, **SHORT)
    own = lightning_fit(policy, tmp_path / "own", EarlyStopping("train/loss", patience=9), ProximalAverage(2.0))
    for trainer in (found.trainer, own):
        for kind in (Monitor, ProximalPolicy, CriticValues):
            assert sum(isinstance(one, kind) for one in trainer.callbacks) == 1, kind  # type: ignore[attr-defined]
    assert isinstance(own.callbacks[0], Monitor) and isinstance(own.callbacks[1], EarlyStopping)


def test_a_reward_that_is_no_address_is_refused() -> None:
    with pytest.raises(popo_lightning.SettingError, match=r"reward is 'near'.*my_rewards\.py:near"):
        popo_lightning.fit("countdown_tiny", "popo", reward="near")
