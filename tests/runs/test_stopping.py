"""Runs stopped by a signal or an error. When resumed, they equal uninterrupted runs bit for bit."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.nodes import fsdp2, one_node
from helpers.processes import on_two_ranks
from helpers.tiny_models import environment, method, metrics, popo, popo_process

from popo_lightning.runs.continue_command import continue_command, without_options
from popo_lightning.runs.folder import newest_of
from popo_lightning.runs.stopping import SIGNALS, Stopped, StopRequests, stopped_in_words
from runs.test_resume import checkpoint, weights_in

ITERATIONS, MINIBATCHES = 4, 3
ENGINE = ["--data.engine", "helpers.tiny_models.SignalWhileSampling", "--data.engine.call"]


@pytest.fixture(scope="module")
def command(config: Path) -> list[str | Path]:
    samples = ["--samples.every_n_iterations", "1", "--trainer.max_epochs", str(ITERATIONS)]
    buffer = ["--data.composer.buffer.capacity", "12"]
    return ["fit", "--config", config, *method("popo"), *buffer, *samples, "--checkpoint.every_n_epochs", "20"]


@pytest.fixture(scope="module")
def whole(command: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    popo(*command, "--run.folder", folder)
    assert sum(row.get("replay/groups", 0) for row in metrics(folder)) > 0
    return folder


def at(hook: str, iteration: int, minibatch: int = 0, number: int = signal.SIGINT) -> list[str]:
    place = {"hook": hook, "iteration": iteration, "minibatch": minibatch, "number": int(number)}
    found = ["--trainer.callbacks+", "helpers.tiny_models.SignalAt"]
    for name, value in place.items():
        found += [f"--trainer.callbacks.{name}", str(value)]
    return found


def assert_same_metrics(resumed: Path, whole: Path) -> None:
    different = [
        (left["step"], name, left.get(name), right.get(name))
        for left, right in zip(metrics(resumed), metrics(whole), strict=False)
        for name in left.keys() | right.keys()
        if left.get(name) != right.get(name)
    ]
    assert different == [] and len(metrics(resumed)) == len(metrics(whole))


def assert_same_end(resumed: Path, whole: Path) -> None:
    assert_same_metrics(resumed, whole)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    left, right = (weights_in(checkpoint(folder, ITERATIONS * MINIBATCHES)) for folder in (resumed, whole))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# Calls of the engine: greedy and sampled at the start, iterations 1 and 2, greedy and sampled after the second, and so
# on.
STOPS = {
    "inside an iteration": (at("on_train_batch_start", 2, 1), 5),
    "in the last minibatch": (at("on_train_batch_end", 2, 2), 6),
    "in the only iteration so far": (at("on_train_batch_start", 1, 0), 1),
    "at the end of an iteration": (at("on_train_epoch_end", 1), 3),
    "while sampling": ([*ENGINE, "7"], 6),
    "while the first minibatches are sampled": ([*ENGINE, "4"], 3),
    "while evaluating": ([*ENGINE, "6"], 6),
    "in the last evaluation's iteration": (at("on_train_batch_start", 4, 2), 12),
    "by SIGTERM": (at("on_train_batch_start", 3, 1, signal.SIGTERM), 8),
    "by SIGHUP, while sampling": ([*ENGINE, "7", "--data.engine.number", str(int(signal.SIGHUP))], 6),
}


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_resumed(
    command: list[str | Path], whole: Path, tmp_path: Path, stop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how, step = STOPS[stop]
    with pytest.raises(SystemExit) as ended:
        popo(*command, *how, "--run.folder", tmp_path)
    number = {"by SIGTERM": signal.SIGTERM, "by SIGHUP, while sampling": signal.SIGHUP}.get(stop, signal.SIGINT)
    assert ended.value.code == 128 + number
    saved = checkpoint(tmp_path, step)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "stopped by" in line]
    assert f"stopped by {number.name} after iteration {-(-step // MINIBATCHES)}" in said and str(saved) in said
    assert said.endswith(f"--run.folder {tmp_path} --run.resume true")
    assert (f"minibatch {step % MINIBATCHES} of {MINIBATCHES}" in said) == bool(step % MINIBATCHES)
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_same_end(tmp_path, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("how", [[*ENGINE, "7", "--data.engine.number", "0"], at("on_train_epoch_end", 2, number=0)])
def test_an_error_with_save_on_exception(
    command: list[str | Path], whole: Path, tmp_path: Path, how: list[str]
) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        popo(*command, *how, "--checkpoint.save_on_exception", "true", "--run.folder", tmp_path)
    checkpoint(tmp_path, 6)
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert_same_end(tmp_path, whole)


def test_an_error_inside_a_minibatch_saves_nothing(
    command: list[str | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how = [*at("on_train_batch_end", 2, 1, number=0), "--checkpoint.save_on_exception", "true"]
    with pytest.raises(RuntimeError, match="out of luck"):
        popo(*command, *how, "--run.folder", tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*")) and "inside a minibatch" in caplog.text


def test_stopped_before_anything_is_saved(
    command: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        popo(*command, *ENGINE, "1", "--run.folder", tmp_path)
    assert ended.value.code == 130
    assert "stopped by SIGINT before anything was saved; start again by: popo fit" in capsys.readouterr().err


class InterruptedSetup(L.Callback):
    def setup(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_interrupted_while_it_starts(command: list[str | Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        popo(*command, "--trainer.callbacks+", f"{__name__}.InterruptedSetup", "--run.folder", tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    assert ended.value.code == 130


def test_validate_stops_at_once(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        popo("validate", "--config", config, *ENGINE, "1", "--run.folder", tmp_path)
    assert ended.value.code == 130 and "stopped by SIGINT" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_that_is_named_continues(command: list[str | Path], whole: Path, tmp_path: Path) -> None:
    """Uses separate processes and SIGTERM."""
    how = at("on_train_batch_start", 3, 1, signal.SIGTERM)
    stopped = popo_process(*command, *how, "--run.folder", tmp_path)
    assert stopped.returncode == 143, stopped.stderr
    named = shlex.split(stopped.stderr.split("continue by: popo ")[1].splitlines()[0])
    kept = without_options(named, *(name for name in how if name.startswith("--")))
    assert popo_process(*kept).returncode == 0
    assert_same_end(tmp_path, whole)


def two_rank_command(config: Path, strategy: str) -> list[str | Path]:
    """Returns a command of two iterations with three minibatches each, on two ranks."""
    command = ["fit", "--config", config, *method("popo"), "--trainer.max_epochs", "2"]
    command += ["--data.problems_per_iteration", "8", "--evaluation.every_n_iterations", "0"]
    if strategy == "ddp":
        return [*command, "--trainer.strategy", "ddp"]
    return [*command, *fsdp2(2, whole_checkpoints=strategy == "fsdp2")]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank"), [("ddp", "1"), ("fsdp2", "0"), ("fsdp2 in shards", "null")])
def test_two_ranks_stop_together(config: Path, tmp_path: Path, strategy: str, rank: str) -> None:
    """Any rank may get the signal: torchrun sends it to all, kill to one."""
    command = two_rank_command(config, strategy)
    one_node(2, *command, "--run.folder", tmp_path / "whole", seconds=300)
    how = [*at("on_train_batch_start", 2, 1, signal.SIGTERM), "--trainer.callbacks.rank", rank]
    with pytest.raises(AssertionError, match="stopped by SIGTERM after iteration 2, minibatch 2 of 3"):
        one_node(2, *command, *how, "--run.folder", tmp_path / "resumed", seconds=300)
    assert newest_of([tmp_path / "resumed" / "checkpoints"]) == checkpoint(tmp_path / "resumed", 5)
    one_node(2, *command, "--run.folder", tmp_path / "resumed", "--run.resume", "true", seconds=300)
    assert_same_metrics(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.slow
def test_ranks_that_the_command_starts(config: Path, tmp_path: Path) -> None:
    """Without torchrun, the exit code is that of the rank that started the others."""
    how = [*at("on_train_epoch_end", 1, 0, signal.SIGTERM), "--trainer.callbacks.rank", "0"]
    command = [*two_rank_command(config, "ddp"), "--trainer.devices", "2", "--run.folder", tmp_path]
    stopped = popo_process(*command, *how)
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("stopped by SIGTERM after iteration 1, which") == 1
    checkpoint(tmp_path, 3)


# -- requests --------------------------------------------------------------------------------------------------


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    found = StopRequests()
    yield found
    found.disarm()


ALONE: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda t, reduce_op: t))


def test_a_signal_waits_for_a_place(requests: StopRequests) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    requests.check(ALONE)
    requests.arm()
    requests.check(ALONE)
    with requests.interruptible():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert requests.asked == signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        requests.check(ALONE)
    assert stopped.value.exit_code == 143
    with pytest.raises(Stopped), requests.interruptible():
        raise AssertionError("nothing begins any more")
    with requests.interruptible(alone=False):
        pass
    requests.disarm()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    requests.check(ALONE)


def test_sampling_is_left_at_once(requests: StopRequests) -> None:
    requests.arm()
    reached = False
    with pytest.raises(Stopped), requests.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            reached = True
        except Exception:  # code on the way may catch errors
            reached = True
    assert not reached
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on the same Ctrl-C
    time.sleep(0.05)


def test_what_is_ignored_stays_so(requests: StopRequests) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests.arm()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


DEAF = """
import ctypes, sys
from popo_lightning.runs.stopping import StopRequests
StopRequests().arm(at_once=lambda: print("ranks", file=sys.stderr, flush=True))
print("ready", flush=True)
library = ctypes.CDLL(None)
while True:
    library.usleep(900000)
"""


@pytest.mark.slow
def test_a_second_signal_stops_at_once() -> None:
    """This includes a process that waits for something outside of Python."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # too soon to be another signal
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "a second signal stops at once" in said and "ranks" in said and "stopped at once by SIGTERM" in said


def asked_on_one_rank() -> list[int]:
    dist.init_process_group("gloo")
    trainer: Any = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    found = []
    for rank in (0, 1, None):
        requests = StopRequests()
        requests.arm(say=False)
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        try:
            requests.check(trainer)
            found.append(0)
        except Stopped as stopped:
            found.append(stopped.number)
        requests.disarm()
    dist.destroy_process_group()
    return found


def test_all_ranks_stop_where_one_is_asked(tmp_path: Path) -> None:
    assert on_two_ranks(asked_on_one_rank, tmp_path) == [[signal.SIGTERM, signal.SIGTERM, 0]] * 2


def test_words() -> None:
    stop = Stopped(signal.SIGINT)
    assert stopped_in_words(stop, ["validate"]) == "stopped by SIGINT"
    stop.folder, stop.checkpoint, stop.where = "runs/a b", "x.ckpt", "iteration 3"
    args = ["fit", "--config", "a.yaml", "--ckpt_path", "y", "--run.resume=true", "--run.folder", "z", "--seed", "1"]
    assert stopped_in_words(stop, args) == (
        "stopped by SIGINT after iteration 3, which x.ckpt holds; continue by: popo fit --config a.yaml --seed 1 "
        "--run.folder 'runs/a b' --run.resume true"
    )


@pytest.mark.parametrize("said", ["--config {}.yaml", "--config {}", "-c {}.yaml", "--config={}.yaml", "inline"])
def test_a_checkpoint_of_a_config_file_is_not_gone_back_to(tmp_path: Path, said: str) -> None:
    """Where nothing is saved since, what the run began from goes before it."""
    place = tmp_path / "a b"
    (tmp_path / "a b.yaml").write_text("ckpt_path: old.ckpt\nseed_everything: 1\n")
    given = [part.format(place) for part in said.split(" ")]
    given = given if said != "inline" else ["--config", "ckpt_path: old.ckpt"]
    end = ["--run.folder", "f", "--run.resume", "true"]
    assert continue_command(["fit", *given, "--ckpt_path", "x"], "f") == ["fit", *given, "--ckpt_path", "null", *end]
    assert continue_command(["fit", *given], "f", "x") == ["fit", *given, "--ckpt_path", "x", *end]
    (tmp_path / "a b.yaml").write_text("ckpt_path: null\n")
    given = given if said != "inline" else ["--config", "seed_everything: 1"]
    assert continue_command(["fit", *given], "f") == ["fit", *given, *end]
