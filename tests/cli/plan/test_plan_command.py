"""`popo fit --plan` needs no model and no network, and leaves no files."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.places import REPOSITORY
from helpers.plan import SHAPES, model_folder
from helpers.tiny_models import environment, method, popo, tiny_policy, write_config

from popo_lightning.cli.plan import command
from popo_lightning.cli.plan.memory import GIB
from popo_lightning.core.warm_start import WarmStart

GSM8K = ["fit", "--config", str(REPOSITORY / "configs" / "task" / "gsm8k.yaml"), *method("popo")]
HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"
# Fails on an import or a connection that the plan must not need.
FORBIDDEN = """
import socket, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm":
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Nothing())
from popo_lightning.__main__ import main
sys.argv = ["popo", *sys.argv[1:]]
try:
    main()
finally:
    import torch
    assert not torch.distributed.is_initialized()
    assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder("tiny", tmp_path / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder to work in."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def planned(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Returns (exit code, output, sentence of a refusal or nothing)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        popo(*args)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("popo: ")]
    assert len(said) <= 1
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, "".join(said)


def test_prints_the_plan_and_leaves_no_trace(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, said = planned(capsys, *GSM8K, "--model.path", folder, "--plan")
    assert (code, said) == (0, "")
    for words in (
        "an estimate",
        "82,752",
        "128 x 8",
        "optimizer steps",
        "optimizer state",
        "without gradient checkpointing",
        "with gradient checkpointing",
        "in the cache",
        "the backward pass of a micro-batch",
        "generation",
        "on the disk",
        "nothing was compared",
    ):
        assert words in out, words
    assert not list(here.iterdir())


def test_a_card_that_is_given(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*GSM8K, "--model.path", folder, "--plan", "--card_gib"]
    code, out, said = planned(capsys, *args, "80")
    assert (code, said) == (0, "") and "it fits a card of 80 GiB" in out and "80.00 GiB" in out
    code, out, said = planned(capsys, *args, "1.5")
    assert code == 2 and "a card of 1.5 GiB" in said and "Plan of a run" in out and "Verdict" not in out
    assert not list(here.iterdir())


def test_the_card_that_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [SimpleNamespace(total_memory=gib * GIB, name="card") for gib in (80, 3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    _, out, _ = planned(capsys, *GSM8K, "--model.path", folder, "--trainer.devices", "1", "--plan")
    assert "3.00 GiB" in out and "80.00 GiB" not in out
    _, out, _ = planned(capsys, *GSM8K, "--model.path", folder, "--trainer.accelerator", "cpu", "--plan")
    assert "trainer.accelerator is cpu" in out and "3.00 GiB" not in out


BAD: dict[str, tuple[list[str], list[str]]] = {
    "zero": (["--plan", "--card_gib", "0"], ["--card_gib is 0"]),
    "negative": (["--plan", "--card_gib", "-3"], ["--card_gib is -3"]),
    "endless": (["--plan", "--card_gib", "inf"], ["--card_gib is inf"]),
    "no number": (["--plan", "--card_gib", "many"], ["--card_gib is many"]),
    "vast": (["--plan", "--card_gib", "1e300"], ["--card_gib is 1e300"]),
    "a trace": (["--plan", "--card_gib", "1e-300"], ["--card_gib is 1e-300"]),
    "one of eight devices": (
        ["--plan", "--trainer.devices", "8", "--trainer.strategy", "single_device"],
        ["trainer.strategy is single_device"],
    ),
    "copies": (
        ["--plan", "--trainer.devices", "8", "--trainer.strategy", "ddp_fork"],
        ["trainer.strategy starts its ranks by fork"],
    ),
    "a strategy's class": (
        ["--plan", "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"],
        ["--trainer.strategy.class_path lightning.pytorch.strategies.ModelParallelStrategy"],
    ),
    "no plan": (["--card_gib", "80"], ["--card_gib is 80", "--plan"]),
    "no card": (["--plan", "--card_gib", "80", "--trainer.accelerator", "cpu"], ["--card_gib", "trainer.accelerator"]),
    "group": (["--plan", "--data.group_size", "1"], ["data.group_size is 1"]),
    "share": (["--plan", "--trainer.devices", "7"], ["data.problems_per_iteration is 128", "7"]),
    "positions": (["--plan", "--data.max_new_tokens", "4000"], ["data.max_new_tokens", "4096 positions"]),
    "clipping": (["--plan", "--trainer.gradient_clip_val", "1"], ["model.max_grad_norm"]),
    "rank": (["--plan", "--model.lora", "{r: 100000}"], ["model.lora.r is 100000, but no matrix", "use at most 64"]),
    "optimizer": (["--plan", "--model.optimizer.lr=-1"], ["model.optimizer cannot be made: Invalid learning rate: -1"]),
    "scheduler": (
        [
            "--plan",
            "--model.lr_scheduler",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
            "--model.lr_scheduler.T_max=0",
        ],
        ["model.lr_scheduler is CosineAnnealingLR, which fails at its first step"],
    ),
    "combination": (
        ["--plan", "--data.weight_sync_interval", "2", "--model.behave_weight", "NoCorrection"],
        ["data.weight_sync_interval is 2", "model.behave_weight is NoCorrection"],
    ),
    "prox": (["--plan", "--proximal", "ProximalAverage"], ["proximal is ProximalAverage", "correct_fresh"]),
    "metric": (
        ["--plan", "--checkpoint.save_top_k", "3", "--checkpoint.monitor", "train/los"],
        ["checkpoint.monitor is 'train/los', which is never"],
    ),
    "callback": (
        ["--plan", "--trainer.callbacks", "Timer", "--trainer.callbacks.interval", "step"],
        ["trainer.callbacks has a Timer with interval step"],
    ),
    "plugin": (
        ["--plan", "--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"],
        ["trainer.plugins has AsyncCheckpointIO"],
    ),
    "evaluation": (["--plan", "--evaluation.every_n_iterations=-1"], ["evaluation.every_n_iterations is -1"]),
    "tower": (["--plan", "--model.freeze_vision", "true"], ["model.freeze_vision", "no vision tower"]),
    "precision": (["--plan", "--trainer.precision", "16-mixed"], ["trainer.precision"]),
    "cache": (
        ["--plan", "--card_gib", "80", "--data.engine.gpu_memory_utilization", "0.0001"],
        ["data.engine.gpu_memory_utilization"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, here: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    code, _, said = planned(capsys, *GSM8K, "--model.path", folder, *arguments)
    assert code == 2
    for word in words:
        assert word in said
    assert len(said) < 600
    assert not list(here.iterdir())


CONFIGS = {
    "missing": None,
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no type": "{}",
    "another type": '{"model_type": "t5"}',
    "an unknown type": '{"model_type": "of_tomorrow"}',
    "code of its own": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
    "words": json.dumps(SHAPES["tiny"] | {"hidden_size": "wide"}),
    "heads": json.dumps(SHAPES["tiny"] | {"num_attention_heads": 0}),
    "no layers": json.dumps(SHAPES["tiny"] | {"num_hidden_layers": -1}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_no_model_can_be_built_of(
    case: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    if (content := CONFIGS[case]) is not None:
        (broken / "config.json").write_text(content)
    code, _, said = planned(capsys, *GSM8K, "--model.path", broken, "--plan")
    assert code == 2 and str(broken) in said and "model.path" in said, said


def test_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        popo("fit", "--help")
    assert {"--plan", "--card_gib"} <= set(re.findall(r"--\w+", capsys.readouterr().out))


def test_they_are_no_settings_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The run's config.yaml is valid for every subcommand."""
    with pytest.raises(SystemExit):
        popo(*GSM8K, "--print_config")
    written = yaml.safe_load(capsys.readouterr().out)
    assert not {"plan", "card_gib"} & written.keys() and "trainer" in written
    code, _, _ = planned(capsys, "validate", *GSM8K[1:], "--plan")
    assert code == 2


@pytest.mark.parametrize("task", ["countdown_tiny", "geometry_tiny"])
def test_a_warm_start_is_planned_without_being_built(
    task: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    config = REPOSITORY / "configs" / "task" / f"{task}.yaml"
    code, out, _ = planned(capsys, "fit", "--config", config, *method("ppo"), "--plan")
    assert code == 0 and "critic" in out
    assert not (tmp_path / "cache").exists() and not list(here.iterdir())


def test_a_recipe_knows_the_configuration_of_what_it_builds(policy: Path) -> None:
    """It equals the built folder's configuration, except for the name and version of its writer."""
    recipe, built = tiny_policy().config().to_dict(), WarmStart.config(tiny_policy()).to_dict()
    written = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    assert {k: v for k, v in recipe.items() if k not in written} == {k: v for k, v in built.items() if k not in written}


def test_plan_of_a_run_that_has_begun_touches_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text("step\n1\n")
    code, _, _ = planned(capsys, "fit", "--config", config, "--run.folder", run, "--plan")
    assert code == 0 and (run / "metrics.csv").read_text() == "step\n1\n"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "metrics.csv"]


# -- the hub -------------------------------------------------------------------------------------------------------


def hub_process(home: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FORBIDDEN, *GSM8K, "--model.path", HUB_ID, "--plan", *args],
        env=environment() | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")} | more,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
    )


@pytest.mark.slow
def test_a_cached_configuration_is_enough(tmp_path: Path) -> None:
    """Runs in a separate process, without vLLM and without a network."""
    repository = tmp_path / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    model_folder("tiny", repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    ended = hub_process(tmp_path, "--card_gib", "80", HF_HUB_OFFLINE="1")
    assert ended.returncode == 0, ended.stderr
    assert "82,752" in ended.stdout and HUB_ID in ended.stdout and ended.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


@pytest.mark.slow
def test_offline_without_a_cached_configuration(tmp_path: Path) -> None:
    ended = hub_process(tmp_path, HF_HUB_OFFLINE="1")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (sentence,) = ended.stderr.splitlines()
    for words in (HUB_ID, "config.json", "run once with a network", "folder"):
        assert words in sentence


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    asked: list[Any] = []

    def nowhere(*address: Any, **more: Any) -> Any:
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    begun = time.monotonic()
    code, _, said = planned(capsys, *GSM8K, "--model.path", "nobody/has-this", "--plan")
    assert code == 2 and "nobody/has-this" in said and "config.json" in said
    assert 1 <= len(asked) <= 2 and time.monotonic() - begun < 60


# -- a run on a GPU ------------------------------------------------------------------------------------------------


class FakeRun:
    """Stands in for what a run on a GPU passes on."""

    def __init__(self, folder: Path, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
        from helpers.tiny_models import tiny_task
        from jsonargparse import Namespace

        from popo_lightning.data import RolloutDataModule
        from popo_lightning.policy import PolicyModule

        trainer = {"accelerator": "gpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
        kept = {"every_n_epochs": 20, "save_top_k": 1, "save_last": None, "save_weights_only": False}
        kept |= {"every_n_train_steps": None, "monitor": None}
        self.config = Namespace(
            trainer=Namespace(**trainer, max_epochs=1),
            checkpoint=Namespace(**kept),
            evaluation=Namespace(max_new_tokens=None, benchmarks=None),
        )
        self.policy = PolicyModule(path=str(folder))
        self.data = RolloutDataModule(tiny_task())
        card = SimpleNamespace(total_memory=int(gib * GIB), name="card")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def warn(self, device: str = "cuda:0") -> None:
        command.warn_of_memory(self.config, self.policy, self.data, torch.device(device))


@pytest.mark.parametrize(
    ("gib", "device", "warned"), [(1.5, "cuda:0", True), (80, "cuda:0", False), (1.5, "cpu", False)]
)
def test_a_run_that_begins_is_warned_and_not_stopped(
    gib: float,
    device: str,
    warned: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        FakeRun(folder, gib, monkeypatch).warn(device)
    assert [("does not fit a card of 1.5 GiB" in message) for message in caplog.messages] == [True] * warned


def test_a_plan_that_cannot_be_made_stops_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        FakeRun(folder, 1.5, monkeypatch).warn()
    assert not caplog.messages
