"""The popo command: bad input gives one sentence and exit code 2, and changes no existing file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo, popo_process, random_model, write_config

FILES = (REPOSITORY / "configs" / "task").glob("*.yaml")
TASKS = sorted(file for file in FILES if not file.stem.endswith("_local"))  # files *_local only change another task
METHODS = sorted((REPOSITORY / "configs" / "method").glob("*.yaml"))
Args = list[str | Path]
STRATEGIES, ENGINES = "lightning.pytorch.strategies", "popo_lightning.engines.transformers"


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(config: Path, root: Path) -> Args:
    return ["fit", "--config", config, *method("popo"), "--run.root", root, "--trainer.max_epochs", "2"]


@pytest.fixture(scope="module")
def finished(command: Args, root: Path) -> Path:
    popo(*command, "--checkpoint.every_n_epochs", "1")
    return root / "tiny" / "popo-seed1"


@pytest.fixture(scope="module")
def folders(policy: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Makes broken folders and files by the names that the cases below use."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("adapter", "no_eos", "bare", "other", "cut", "noise")}
    for name in ("no_eos", "bare"):
        shutil.copytree(policy, found[name], dirs_exist_ok=True)
    path = found["no_eos"] / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    (found["adapter"] / "adapter_config.json").write_text("{}")
    for path in found["bare"].glob("token*"):
        path.unlink()
    random_model("llama-untied", found["other"])
    (whole,) = (finished / "checkpoints").glob("*.ckpt")
    content = whole.read_bytes()
    (found["cut"] / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (found["noise"] / "empty.ckpt").write_bytes(b"")
    (found["noise"] / "noise.ckpt").write_bytes(b"not a checkpoint at all\n" * 99)
    torch.save({"state_dict": {}}, found["noise"] / "foreign.ckpt")
    start = content.index(b"RolloutDataModule")  # inside the pickle
    (found["noise"] / "flipped.ckpt").write_bytes(content[: start - 40] + b"\xff" * 80 + content[start + 40 :])
    return found


BAD: dict[str, tuple[list[str], list[str]]] = {  # what is wrong: arguments, words of the sentence
    "method config": (["--config", "configs/method/nope.yaml"], ["nope.yaml"]),
    "key": (["--data.grupo_size", "4"], ["grupo_size"]),
    "key in a class": (["--data.composer.bufer", "4"], ["bufer"]),
    "class": (["--data.composer", "popo_lightning.replay.composer.Nope"], ["Nope"]),
    "type": (["--data.group_size", "many"], ["data.group_size", "many"]),
    "model folder": (
        ["--model.warm_start", "null", "--model.path", "/nowhere/model"],
        ["model.path", "/nowhere/model"],
    ),
    "no model": (["--model.warm_start", "null"], ["model.path", "model.warm_start"]),
    "two models": (["--model.path", "{bare}"], ["model.path", "model.warm_start", "both"]),
    "tokenizer": (["--model.warm_start", "null", "--model.path", "{bare}"], ["{bare}", "tokenizer"]),
    "adapter": (["--model.warm_start", "null", "--model.path", "{adapter}"], ["{adapter}", "merge_and_unload"]),
    "eos": (["--model.warm_start", "null", "--model.path", "{no_eos}"], ["{no_eos}", "eos"]),
    "group size": (["--data.group_size", "0"], ["data.group_size", "0"]),
    "temperature": (["--data.temperature", "0"], ["data.temperature", "0"]),
    "minibatches": (["--data.minibatches", "99"], ["data.minibatches", "99"]),
    "task": (["--data.task", "helpers.tiny_models.NoProblems"], ["data.task", "no problem"]),
    "prompts": (["--data.max_prompt_tokens", "2"], ["data.max_prompt_tokens"]),
    "other model": (
        ["--model.warm_start", "null", "--model.path", "{other}", "--ckpt_path", "{ckpt}", "--trainer.max_epochs", "3"],
        ["checkpoint", "another model", "model.path"],
    ),
    "no checkpoint": (["--ckpt_path", "/nowhere/a.ckpt"], ["/nowhere/a.ckpt"]),
    "cut checkpoint": (["--ckpt_path", "{cut}/cut.ckpt"], ["ckpt_path", "cut.ckpt"]),
    "empty checkpoint": (["--ckpt_path", "{noise}/empty.ckpt"], ["ckpt_path", "empty.ckpt"]),
    "no checkpoint at all": (["--ckpt_path", "{noise}/noise.ckpt"], ["ckpt_path", "noise.ckpt"]),
    "foreign checkpoint": (["--ckpt_path", "{noise}/foreign.ckpt"], ["ckpt_path", "foreign.ckpt"]),
    "flipped checkpoint": (["--ckpt_path", "{noise}/flipped.ckpt"], ["ckpt_path", "flipped.ckpt"]),
    "no GPU": (["--trainer.accelerator", "gpu"], ["trainer.accelerator", "gpu", "auto", "driver"]),
    "MPS": (["--trainer.accelerator", "mps"], ["trainer.accelerator", "mps", "float64"]),
    "accelerator": (["--trainer.accelerator", "gpus"], ["trainer.accelerator is 'gpus'", "auto"]),
    "a list of GPUs": (["--trainer.devices", "[3]"], ["trainer.devices is [3]", "on a CPU"]),
    "all GPUs": (["--trainer.devices", "-1"], ["trainer.devices is -1", "on a CPU"]),
    "no device": (["--trainer.devices", "0"], ["trainer.devices is 0"]),
    "words for devices": (["--trainer.devices", "two"], ["trainer.devices is two"]),
    "no node": (["--trainer.num_nodes", "0"], ["trainer.num_nodes is 0"]),
    "nobody started the nodes": (
        ["--trainer.num_nodes", "2"],
        ["trainer.num_nodes is 2", "torchrun", "docs/multi_node.md"],
    ),
    "strategy": (["--trainer.strategy", "shard"], ["trainer.strategy is 'shard'", "ddp"]),
    "a strategy's class": (
        ["--trainer.strategy", f"{STRATEGIES}.ModelParallelStrategy"],
        ["trainer.strategy is", f"--trainer.strategy.class_path {STRATEGIES}.ModelParallelStrategy"],
    ),
    "a strategy's class alone": (["--trainer.strategy", "DDPStrategy"], ["trainer.strategy.class_path DDPStrategy"]),
    "a strategy's settings": (
        ["--trainer.strategy", f"{{{{class_path: {STRATEGIES}.DDPStrategy, init_args: {{{{start_metod: fork}}}}}}}}"],
        ["trainer.strategy is", "start_metod", "configs/scale"],
    ),
    "copies of the process": (
        ["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"],
        ["trainer.strategy starts its ranks by spawn", "ddp"],
    ),
    "one of two devices": (
        ["--trainer.strategy", "single_device", "--trainer.devices", "2"],
        ["trainer.strategy is single_device", "2 devices", "ddp"],
    ),
    "FSDP1 on a CPU": (["--trainer.strategy", "fsdp"], ["trainer's settings", "fsdp", "cpu"]),
    "precision": (["--trainer.precision", "16-mixed"], ["trainer.precision is '16-mixed'", "bf16-mixed"]),
    "seed below zero": (["--seed_everything", "-1"], ["seed_everything is -1", "4294967295"]),
    "seed too large": (["--seed_everything", "4294967296"], ["seed_everything is 4294967296"]),
    "no seed": (["--seed_everything", "false"], ["seed_everything is False"]),
    "a seed by chance": (["--seed_everything", "true"], ["seed_everything is True"]),
    "batch": (
        ["--data.engine", f"{ENGINES}.TransformersEngine", "--data.engine.batch_size", "0"],
        ["data.engine.batch_size is 0"],
    ),
    "clipping": (["--trainer.gradient_clip_val", "1.0"], ["trainer.gradient_clip_val", "model.max_grad_norm"]),
    "accumulation": (["--trainer.accumulate_grad_batches", "2"], ["trainer.accumulate_grad_batches"]),
    "folder": (["--run.folder", "{finished}"], ["run.folder", "{finished}", "run.resume"]),
}


def one_sentence(stderr: str) -> str:
    assert "Traceback" not in stderr
    ours = [line for line in stderr.splitlines() if line.startswith("popo: ")]
    assert len(ours) == 1, stderr
    assert stderr.rstrip("\n").splitlines()[-1] == ours[0]
    return ours[0]


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str,
    command: Args,
    tmp_path: Path,
    finished: Path,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished = Path(shutil.copytree(finished, tmp_path / "finished"))
    names: dict[str, Any] = folders | {"finished": finished, "ckpt": next(finished.rglob("*.ckpt"))}
    arguments, words = ([text.format(**names) for text in texts] for texts in BAD[case])
    before = digests(finished)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        popo(*command, *arguments)
    assert stopped.value.code == 2
    sentence = one_sentence(capsys.readouterr().err)
    print(sentence)
    for word in words:
        assert word in sentence
    assert len(sentence) < 600
    after = digests(finished)
    assert before and before == after


@pytest.mark.parametrize("name", ["cut/cut", "noise/noise", "noise/flipped", "noise/nothing"])
def test_validate_refuses_too(
    name: str, config: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = name.split("/")
    with pytest.raises(SystemExit) as stopped:
        popo("validate", "--config", config, "--ckpt_path", folders[folder] / f"{file}.ckpt")
    assert stopped.value.code == 2
    assert f"{file}.ckpt" in one_sentence(capsys.readouterr().err)


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(command: Args, finished: Path) -> None:
    before = digests(finished)
    stopped = popo_process(*command, "--run.folder", finished)
    assert stopped.returncode == 2
    assert "run.folder" in one_sentence(stopped.stderr)
    assert stopped.stdout == ""
    assert digests(finished) == before


@pytest.mark.parametrize(
    ("task_file", "method_file"),
    [(TASKS[number % len(TASKS)], one) for number, one in enumerate(METHODS)],
    ids=lambda path: path.stem,
)
def test_configs_parse(task_file: Path, method_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parses every method and every task. tests/methods/test_config_orders.py shows that they set different things."""
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", task_file, "--config", method_file, "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"method: {method_file.stem}" in printed
    assert f"task: {task_file.stem}" in printed


def test_second_run_gets_a_folder_of_its_own(command: Args, finished: Path, root: Path) -> None:
    before = digests(finished)
    popo(*command)
    popo(*command)
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["popo-seed1", "popo-seed1-2", "popo-seed1-3"]
    assert digests(finished) == before
    assert metrics(root / "tiny" / "popo-seed1-2") == metrics(finished)  # with the same numbers
    assert (root / "tiny" / "popo-seed1-2" / "summary.json").exists()


def test_config_of_a_run_runs_again(finished: Path, tmp_path: Path) -> None:
    """config.yaml in the run's folder holds all settings."""
    popo("fit", "--config", finished / "config.yaml", "--run.folder", tmp_path, "--checkpoint.dirpath", "null")
    assert metrics(tmp_path) == metrics(finished)


def test_validate_gives_the_numbers_of_the_end(command: Args, finished: Path, config: Path, tmp_path: Path) -> None:
    (last,) = (finished / "checkpoints").glob("*.ckpt")
    before = digests(finished)
    same = ["--config", config, *method("popo"), "--run.folder", tmp_path]
    cli = popo("validate", *same, "--ckpt_path", last)
    at_end = [row for row in metrics(finished) if "eval/countdown/greedy" in row][-1]
    measured = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    names = [name for name in at_end if name.startswith("eval/")]
    assert len(names) == 6
    for name in names:
        assert measured[name] == pytest.approx(at_end[name], abs=1e-6)
    start = next(row for row in metrics(finished) if "eval/countdown/greedy" in row)
    assert any(start[name] != at_end[name] for name in names), "training changed nothing, so this proves nothing"
    assert digests(finished) == before


def test_validate_adds_its_results_to_the_run_and_changes_nothing_else(finished: Path, config: Path) -> None:
    (last,) = (finished / "checkpoints").glob("*.ckpt")
    before = digests(finished)
    popo("validate", "--config", config, *method("popo"), "--ckpt_path", last)
    after = digests(finished)
    assert {name: after[name] for name in before} == before
    added = after.keys() - before.keys()
    assert added and all(name.startswith("evaluations/validate/") for name in added)
    shutil.rmtree(finished / "evaluations" / "validate")


def test_predict_writes_every_response(config: Path, finished: Path, tmp_path: Path) -> None:
    (last,) = (finished / "checkpoints").glob("*.ckpt")
    popo("predict", "--config", config, "--run.folder", tmp_path, "--ckpt_path", last)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 12 * 2
    assert {"problem", "prompt", "response", "score", "acc", "finish_reason"} <= rows[0].keys()


def test_written_config_is_what_the_tests_say(tmp_path: Path, policy: Path) -> None:
    """Overrides in a YAML reach the run: other minibatches give another number of steps."""
    config = write_config(tmp_path / "four.yaml", minibatches=4)
    cli = popo("fit", "--config", config, "--run.folder", tmp_path / "run", "--trainer.max_epochs", "1")
    assert cli.trainer.global_step == 4


@pytest.mark.parametrize(("setting", "value"), [("run.method", ""), ("run.task", "../else"), ("run.method", "..")])
def test_names_of_runs_are_plain(config: Path, setting: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, f"--{setting}={value}")
    assert stopped.value.code == 2
    assert f"{setting} is '{value}', which names no folder" in capsys.readouterr().err
