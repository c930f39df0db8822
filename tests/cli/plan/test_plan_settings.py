"""The plan reads settings as Lightning and the engine do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_task
from jsonargparse import Namespace

from popo_lightning.cli.plan.run_settings import (
    DDP,
    FSDP,
    OTHER,
    SERVERS,
    TRANSFORMERS,
    VLLM,
    WHOLE,
    RunSettings,
    count_devices,
    read_settings,
)
from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.servers.engine import ServerEngine
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.critic import Critic
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.regularizers import KL, EntropyBonus
from popo_lightning.policy import PolicyModule

LIGHTNING = "lightning.pytorch.strategies."


def strategy(name: str, **arguments: Any) -> Namespace:
    return Namespace(class_path=LIGHTNING + name, init_args=Namespace(**arguments))


def read(
    trainer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    for_card: bool = True,
) -> RunSettings:
    given = {
        "accelerator": "gpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": None,
        "max_epochs": 100,
    }
    kept = {"every_n_epochs": 20, "save_top_k": 1, "save_last": None, "save_weights_only": False}
    kept |= {"every_n_train_steps": None, "monitor": None}
    config = Namespace(
        trainer=Namespace(**(given | (trainer or {}))),
        checkpoint=Namespace(**(kept | (checkpoint or {}))),
        evaluation=Namespace(**({"max_new_tokens": None, "benchmarks": None} | (evaluation or {}))),
    )
    policy = PolicyModule(path="model", **(model or {}))
    return read_settings(config, policy, RolloutDataModule(tiny_task(), **(data or {})), for_card)


@pytest.mark.parametrize(
    ("devices", "count"),
    [(8, 8), ("8", 8), ([3], 1), ([4, 5, 6, 7], 4), ("0,1", 2), ("[0, 1, 2]", 3), ("0,", 1), ([0], 1), (1, 1)],
)
def test_devices(devices: Any, count: int) -> None:
    assert count_devices(devices, True, []) == count


@pytest.mark.parametrize("devices", [0, -2, "many", [], "0"])
def test_no_devices(devices: Any) -> None:
    with pytest.raises(SettingError, match=r"trainer\.devices"):
        count_devices(devices, True, [])


@pytest.mark.parametrize("devices", ["auto", -1, "-1"])
def test_all_devices(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (count_devices(devices, True, notes), count_devices(devices, False, notes), notes) == (4, 1, [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_devices(devices, True, notes) == 1 and "this plan is for one" in notes[0]


LAYOUTS: list[tuple[Any, int, tuple[str, int, bool]]] = [
    ("auto", 1, (WHOLE, 1, False)),
    ("auto", 8, (DDP, 1, True)),
    ("ddp", 1, (DDP, 1, True)),
    ("ddp_find_unused_parameters_true", 8, (DDP, 1, True)),
    (strategy("DDPStrategy", gradient_as_bucket_view=False), 8, (DDP, 1, False)),
    (strategy("SingleDeviceStrategy", device="cpu"), 1, (WHOLE, 1, False)),
    (strategy("ModelParallelStrategy", data_parallel_size=8, tensor_parallel_size=1), 8, (FSDP, 8, False)),
    (strategy("ModelParallelStrategy", data_parallel_size=1, tensor_parallel_size=1), 1, (FSDP, 1, False)),
]


@pytest.mark.parametrize(("given", "devices", "expected"), LAYOUTS)
def test_strategies(given: Any, devices: int, expected: tuple[str, int, bool]) -> None:
    run = read({"strategy": given, "devices": devices})
    assert (run.layout, run.shards, run.bucket_view) == expected and run.ranks == devices


def test_nodes_are_ranks() -> None:
    run = read(
        {"strategy": strategy("ModelParallelStrategy", data_parallel_size=16, tensor_parallel_size=1)}
        | {"devices": 8, "num_nodes": 2}
    )
    assert (run.ranks, run.shards) == (16, 16)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": (
        {"trainer": {"strategy": strategy("ModelParallelStrategy", data_parallel_size=4), "devices": 8}},
        "data_parallel_size",
    ),
    "shares": ({"trainer": {"devices": 3, "strategy": "ddp"}}, "data.problems_per_iteration is 32"),
    "strategy": ({"trainer": {"strategy": "nonsense"}}, "trainer.strategy is 'nonsense'"),
    "class": ({"trainer": {"strategy": strategy("Nonsense")}}, "Nonsense"),
    "way": (
        {"trainer": {"strategy": strategy("FSDPStrategy")}},
        "FSDP2",
    ),
    "accelerator": ({"trainer": {"accelerator": "tpu"}}, "trainer.accelerator is 'tpu'"),
    "cpu": ({"trainer": {"accelerator": "cpu"}}, "--card_gib"),
    "precision": ({"trainer": {"precision": "16-mixed"}}, "trainer.precision is '16-mixed'"),
    "prompts": ({"data": {"max_prompt_tokens": 0}}, "data.max_prompt_tokens is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(SettingError) as refused:
        read(**arguments)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_without_a_word_the_plan_is_for_a_gpu(accelerator: str) -> None:
    assert read({"accelerator": accelerator}, for_card=False).on_gpu
    assert not read({"accelerator": "cpu"}, for_card=False).on_gpu


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        (None, "float32", (False, torch.float32)),
        (32, "float32", (False, torch.float32)),
        ("bf16-mixed", "float32", (True, torch.bfloat16)),
        ("bf16", "float32", (True, torch.bfloat16)),
        ("bf16-mixed", "bfloat16", (False, torch.bfloat16)),
        ("32-true", "bfloat16", (False, torch.bfloat16)),
    ],
)
def test_precision(precision: Any, dtype: str, expected: tuple[bool, torch.dtype]) -> None:
    run = read({"precision": precision}, {"dtype": dtype})
    assert (run.autocast, run.compute_dtype) == expected


def test_model_and_batch() -> None:
    regularizers = [KL(0.01), EntropyBonus(0.001)]
    run = read(
        {"devices": 2, "strategy": "ddp"},
        {
            "regularizers": regularizers,
            "advantage": GAE(),
            "critic": Critic(),
            "micro_batch_tokens": 77,
            "gradient_checkpointing": True,
            "freeze_vision": True,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
        },
        {
            "problems_per_iteration": 24,
            "group_size": 5,
            "minibatches": 3,
            "ppo_epochs": 2,
            "max_prompt_tokens": 11,
            "max_new_tokens": 22,
            "image_pixels": (784, 7840),
        },
        {"every_n_epochs": 7, "save_top_k": 3, "save_last": True, "save_weights_only": True},
    )
    assert run.has_reference and run.has_critic and run.entropy_gradient and run.freeze_vision
    assert (run.micro_batch_tokens, run.gradient_checkpointing, run.optimizer.bytes_kept) == (77, True, 0)
    assert (run.problems, run.group_size, run.minibatches, run.ppo_epochs) == (24, 5, 3, 2)
    assert (run.prompt_tokens, run.response_tokens, run.sequence_tokens, run.image_pixels) == (11, 22, 33, 7840)
    assert (run.checkpoint_every, run.checkpoints_kept, run.checkpoint_has_optimizer) == (7, 3, False)
    assert run.checkpoint_last_beside
    assert run.rank_sequences == 60
    plain = read()
    assert not (plain.has_reference or plain.has_critic or plain.entropy_gradient or plain.gradients_held_whole)
    assert read(checkpoint={"save_top_k": -1, "save_last": True}).checkpoints_kept == -1


def test_gradients_held_whole_are_read_from_the_policy() -> None:
    sharded = {"strategy": strategy("ModelParallelStrategy", data_parallel_size=1, tensor_parallel_size=1)}
    for way, held in (("step", True), ("micro_batch", False)):
        assert read(sharded, {"gradient_sync": way}).gradients_held_whole == held
        assert not read({"strategy": "ddp"}, {"gradient_sync": way}).gradients_held_whole


def test_the_longest_evaluation_decides_what_the_engine_makes_room_for() -> None:
    benchmarks = {"one": Namespace(max_new_tokens=5000), "other": Namespace(max_new_tokens=None)}
    run = read(evaluation={"max_new_tokens": 3000, "benchmarks": benchmarks})
    assert run.engine_tokens == 1024 + 5000 and run.sequence_tokens == 2048
    assert read(evaluation={"max_new_tokens": 10}).engine_tokens == 2048


def test_engines() -> None:
    given = VLLMEngine(gpu_memory_utilization=0.3, sleep_level=1, cpu_cache_gib=2, max_num_seqs=9)
    vllm = read(data={"engine": given}).engine
    assert (vllm.kind, vllm.share, vllm.sleep_level, vllm.cpu_cache, vllm.max_num_seqs) == (VLLM, 0.3, 1, 2**31, 9)
    engine = VLLMEngine()
    engine.sleep_level = None  # type: ignore[assignment]
    assert read(data={"engine": engine}).engine.sleep_level == 2
    assert read({"accelerator": "cpu"}, data={"engine": engine}, for_card=False).engine.sleep_level == 0
    transformers = read(data={"engine": TransformersEngine(batch_size=9)}).engine
    assert (transformers.kind, transformers.batch_size) == (TRANSFORMERS, 9)
    assert read(data={"engine": ServerEngine(urls=["http://127.0.0.1:1"])}).engine.kind == SERVERS


def test_an_engine_of_the_users_is_named_as_unknown() -> None:
    class Mine(TransformersEngine.__base__):  # type: ignore[name-defined,misc]
        start = generate = update_weights = stop = None

    run = read(data={"engine": Mine()})
    assert run.engine.kind == OTHER and "Mine" in run.notes[0]


def test_nothing_is_read_from_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read()
    assert not list(tmp_path.iterdir())
