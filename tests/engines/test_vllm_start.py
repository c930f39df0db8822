"""The arguments that vLLM gets at its start and the state it leaves, without a GPU and without vLLM's own work."""

from __future__ import annotations

import gc
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import vllm as vllm_for_tests
from helpers.tiny_models import method, popo
from helpers.vllm import RANKS, Recorder, started
from torch._dynamo import eval_frame

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import Sampling
from popo_lightning.engines.vllm import process as vllm_process
from popo_lightning.engines.vllm.batch import Batch, own_batch
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.prompts import Prompt

llm = vllm_for_tests.llm

SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "1", "SLURM_NODEID": "1"}


@pytest.fixture(autouse=True)
def end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.engines.vllm.engine.end_token_ids", lambda folder, tokenizer: [1])


def test_vllm_samples_on_the_trainers_gpu_with_one_rank(llm: Recorder) -> None:
    started("cuda:3")
    assert llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert llm.environment["LOCAL_RANK"] == "3"  # vLLM takes it as the number of the GPU
    assert (llm.environment["RANK"], llm.environment["WORLD_SIZE"]) == ("0", "1")
    with socket.socket() as free:  # for the process group that vLLM makes
        free.bind((llm.environment["MASTER_ADDR"], int(llm.environment["MASTER_PORT"])))
    assert llm.calls == ["device 3"]  # the current device is set again


def test_under_slurm_ranks_are_the_trainers(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sets neither RANK nor LOCAL_RANK, and Lightning's process group exists already."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(vllm_process.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("MASTER_PORT", "12345")
    started("cuda:2", rank=11, world_size=16, local_rank=3)
    assert llm.environment == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "2", "MASTER_PORT": "12345"}
    assert "RANK" not in os.environ and "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def test_ranks_on_cpus(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")  # as a launcher left it
    started("cpu", rank=5, world_size=6, local_rank=1)
    assert llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert (llm.environment["RANK"], llm.environment["LOCAL_RANK"]) == ("5", "1")
    assert os.environ["LOCAL_RANK"] == "7" and "RANK" not in os.environ


def test_the_environment_is_put_back_when_the_start_fails(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("no memory")

    llm.during_start = fail
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(
        SettingError, match=r"vLLM does not start with data\.engine\.gpu_memory_utilization 0\.6: no memory"
    ):
        started()
    assert {name: os.environ.get(name) for name in RANKS} == dict.fromkeys(RANKS) | {"RANK": "2"}


def test_the_process_is_left_as_it_was(llm: Recorder) -> None:
    def replace_threads() -> None:
        setattr(torch, "set_num_threads", lambda count: None)  # noqa: B010  # as vLLM does on a CPU

    llm.during_start = replace_threads
    set_threads = torch.set_num_threads
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert gc.get_freeze_count() == 0 and torch.get_float32_matmul_precision() == "highest"
    started()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert gc.get_freeze_count() == 0 and torch.get_float32_matmul_precision() == "highest"
    assert torch.set_num_threads is set_threads


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cuda:3", {}, {"enforce_eager": False, "enable_sleep_mode": True, "gpu_memory_utilization": 0.6}),
        ("cuda:3", {"enforce_eager": True, "sleep_level": 0}, {"enforce_eager": True, "enable_sleep_mode": False}),
        ("cpu", {}, {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}),
        ("cpu", {"enforce_eager": False}, {"enforce_eager": False}),
    ],
)
def test_settings_follow_the_device(llm: Recorder, device: str, settings: dict[str, Any], expected: Any) -> None:
    engine = started(device, **settings)
    assert {name: llm.arguments[name] for name in expected} == expected
    assert ("gpu_memory_utilization" in llm.arguments) == (device != "cpu")
    before = eval_frame._stance.stance
    with engine._apart():
        inside = eval_frame._stance.stance
    assert inside == ("force_eager" if llm.arguments["enforce_eager"] else before)
    assert eval_frame._stance.stance == before == "default", "compiled layers of the trainer would stay eager"


@pytest.mark.parametrize(
    ("card", "responses", "setting", "expected"),
    [
        ((24, "NVIDIA GeForce RTX 4090"), 700, None, 700),
        ((24, "NVIDIA GeForce RTX 4090"), 5000, None, 1024),
        ((24, "NVIDIA GeForce RTX 4090"), 64, None, 256),  # vLLM's own: an evaluation may ask for more
        ((79, "NVIDIA A100-SXM4-80GB"), 700, None, 700),
        ((79, "NVIDIA H100 80GB HBM3"), 700, None, 1024),
        ((24, "NVIDIA GeForce RTX 4090"), 700, 16, 16),
        ((24, "NVIDIA GeForce RTX 4090"), None, None, None),  # validate, or sample
        (None, 700, None, None),
        (None, 700, 16, 16),
    ],
)
def test_sequences_at_once(
    card: tuple[int, str] | None,
    responses: int | None,
    setting: int | None,
    expected: int | None,
    llm: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM alone decodes 256 at once on a small card, however many an iteration asks for."""
    if card is not None:
        properties = SimpleNamespace(total_memory=card[0] * 2**30, name=card[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    started("cpu" if card is None else "cuda:3", max_num_seqs=setting, responses=responses)
    assert llm.arguments.get("max_num_seqs") == expected


def test_vllms_own_batch() -> None:
    """Compares with vLLM's rule, which asks its platform for the card."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    usage = pytest.importorskip("vllm.usage.usage_lib").UsageContext.LLM_CLASS
    for gib, name in ((24, "RTX 4090"), (69, "H100"), (70, "H100"), (79, "NVIDIA A100"), (180, "B200"), (160, "A100")):
        platform = SimpleNamespace(
            get_device_total_memory=lambda: gib * 2**30,  # noqa: B023
            get_device_name=lambda: name,  # noqa: B023
            is_tpu=lambda: False,
            is_cpu=lambda: False,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arg_utils, "current_platform", platform)
            tokens, sequences = arg_utils.EngineArgs.get_batch_defaults(1)
        assert own_batch(gib * 2**30, name) == Batch(sequences[usage], tokens[usage]), (gib, name)


@pytest.mark.parametrize("count", [0, -1])
def test_no_sequences_at_once_are_refused(count: int) -> None:
    with pytest.raises(SettingError, match=rf"data\.engine\.max_num_seqs is {count}; use at least 1, or null"):
        VLLMEngine(max_num_seqs=count)


@pytest.mark.parametrize(("device", "of_steps"), [("cuda:3", 1), ("cpu", 2)])
def test_a_gpus_steps_have_the_threads_that_vllm_chose(
    device: str, of_steps: int, llm: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads wait for each other in every step. The caller's work between two steps has its own."""
    monkeypatch.setattr("popo_lightning.engines.vllm.engine.end_token_ids", lambda folder, tokenizer: [1])
    llm.during_start = lambda: torch.set_num_threads(1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = started(device)
        llm.steps, between = 3, []
        for _ in engine.stream([Prompt(torch.tensor([2]))], 2, Sampling(4), seed=1):
            between.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert llm.threads == [of_steps] * 3 and between == [2] * 3


@pytest.mark.parametrize(
    ("trainer", "vllm", "remedy"),
    [
        ("cpu", "cuda", "set trainer.accelerator to auto"),
        ("cuda:0", "cpu", "set trainer.accelerator to cpu"),
        ("cuda:0", "", "install the build of vLLM for cuda"),
    ],
)
def test_another_kind_of_device_is_refused(
    trainer: str, vllm: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms.current_platform, "device_type", vllm)
    with pytest.raises(SettingError, match=r"trainer\.accelerator") as refusal:
        VLLMEngine().check(torch.device(trainer))
    sentence = str(refusal.value)
    assert remedy in sentence and (vllm or "no device") in sentence and trainer.partition(":")[0] in sentence
    monkeypatch.setattr(platforms.current_platform, "device_type", trainer.partition(":")[0])
    VLLMEngine().check(torch.device(trainer))


def test_a_run_is_refused_before_a_model_loads(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms.current_platform, "device_type", "cuda")
    loaded: list[str] = []
    monkeypatch.setattr("popo_lightning.model.policy_model.load_trainable", lambda *args: loaded.append("policy"))
    engine = ["--data.engine", "popo_lightning.engines.vllm.engine.VLLMEngine", "--run.folder", tmp_path / "run"]
    for command in (["fit", *method("popo")], ["validate"]):
        with pytest.raises(SystemExit) as stopped:
            popo(*command, "--config", config, *engine)
        assert stopped.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("popo: ")]
        assert len(said) == 1 and "trainer.accelerator trains on cpu" in said[0] and "auto" in said[0]
    assert not loaded
