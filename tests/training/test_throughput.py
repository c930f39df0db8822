"""Tokens per second, model FLOPs utilisation and memory, against counts by hand."""

from __future__ import annotations

import csv
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.groups import group, response
from helpers.nodes import one_node
from helpers.tiny_models import fit, method

from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.rollout.report import RolloutReport, of_all_ranks, rollout_metrics
from popo_lightning.training import throughput
from popo_lightning.training.model_flops import ModelFlops
from popo_lightning.training.throughput import Worker, peak_tflops, take_peak_memory, throughput_metrics

GIB = 2**30

# -- operations of a model -----------------------------------------------------------------------------------------


def of_model(config: Any) -> ModelFlops:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = ModelFlops.of_model(config, {name: list(p.shape) for name, p in model.named_parameters()})
    assert found is not None
    return found


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
ATTENTION = 8 * 24 + 2 * 8 * 12 + 24 * 8  # query, key and value, output
FEED_FORWARD = 3 * 8 * 12
NORMS = 2 * 8
HEAD = 50 * 8
WIDTH = 4 * 6


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_by_hand(tied: bool) -> None:
    """The input embedding costs nothing and the head does, whether they are tied or not."""
    from transformers import LlamaConfig

    flops = of_model(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    parameters = 3 * (ATTENTION + FEED_FORWARD + NORMS) + 8 + HEAD
    assert (flops.parameters, flops.layers, flops.windowed_layers, flops.width) == (parameters, 3, 0, WIDTH)
    assert flops.of_row(7) == 7 * (6 * parameters + 12 * 3 * WIDTH * 7)
    longer = replace(group(1), prompt_ids=torch.ones(5).long())
    assert [len(group(0).prompt_ids), *(len(r.token_ids) for r in group(0).responses)] == [2, 2, 2]
    assert flops.of_minibatch(Minibatch([group(0), longer], 0, 0)) == 2 * flops.of_row(4) + 2 * flops.of_row(7)


def test_a_frozen_parameter_has_no_gradient_of_its_own() -> None:
    """It costs 4 operations per token instead of 6."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    whole, part = ModelFlops.of_model(config, shapes), ModelFlops.of_model(config, shapes, {name})
    assert whole is not None and part is not None
    assert whole.of_row(7) - part.of_row(7) == pytest.approx(7 * 2 * 8 * 12)
    none = ModelFlops.of_model(config, shapes, shapes.keys())
    assert none is not None and none.parameters == pytest.approx(whole.parameters * 2 / 3)


def test_of_experts_those_that_a_token_goes_through() -> None:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "decoder_sparse_step": 1}
    flops = of_model(Qwen3MoeConfig(**SIZES, **experts, tie_word_embeddings=False))
    layer = ATTENTION + 2 * 6 + NORMS + 8 * 8 + 2 * (3 * 8 * 5)  # with norms of queries and keys, and the router
    assert flops.parameters == 3 * layer + 8 + HEAD


def test_windows_bound_what_attention_sees() -> None:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    flops = of_model(Gemma3TextConfig(**SIZES, layer_types=kinds, sliding_window=4))
    assert (flops.layers, flops.windowed_layers, flops.window) == (1, 2, 4)
    assert flops.of_row(3) == 3 * (6 * flops.parameters + 12 * WIDTH * 3 * 3)
    assert flops.of_row(10) == 10 * (6 * flops.parameters + 12 * WIDTH * (10 + 2 * 4))


def test_a_vision_tower_does_not_count() -> None:
    from transformers import LlamaConfig

    shapes = {"model.embed_tokens.weight": [50, 8], "model.visual.blocks.0.weight": [99, 99], "model.layer": [8, 8]}
    found = ModelFlops.of_model(LlamaConfig(**SIZES), shapes)
    assert found is not None and found.parameters == HEAD + 64


def test_keys_and_values_of_different_sizes() -> None:
    from transformers import DeepseekV3Config

    heads = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 8, "num_attention_heads": 4}
    found = ModelFlops.of_model(DeepseekV3Config(num_hidden_layers=3, **heads), {})
    assert found is not None and (found.layers, found.width) == (3, 4 * (6 + 8) / 2)


def test_layers_that_nobody_describes_cost_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MambaConfig

    policy = policy_on("NVIDIA H200", monkeypatch)
    policy.model.config = MambaConfig()
    worker = Worker.of_policy(policy, None)
    assert worker.flops is None and worker.peak is None
    assert worker.work(Minibatch([group(0)], 0, 0)) == {"row_tokens": 8.0, "flops": 0.0}


# -- cards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        # none of the above
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Tesla T4", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_by_the_name_of_the_card(card: str, peak: float | None) -> None:
    assert peak_tflops(card) == peak


def policy_on(card: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the parts of a policy on such a card that the code needs."""
    from transformers import LlamaConfig

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        model=SimpleNamespace(config=LlamaConfig(**SIZES)),
        described={"policy_shapes": {"model.lm_head.weight": [50, 8], "value_model.head.weight": [1, 8]}},
        trainer=SimpleNamespace(is_global_zero=True),
    )


def test_an_unknown_card_is_told_once_unless_its_peak_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_on("Card of tomorrow", monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert Worker.of_policy(policy, None).peak is None
    assert [record.message for record in caplog.records] == [
        "no throughput/mfu: the peak of a Card of tomorrow is not known here; set monitor.peak_tflops"
    ]
    caplog.clear()
    assert Worker.of_policy(policy, 50.0).peak == 50.0
    known = Worker.of_policy(policy_on("NVIDIA H200", monkeypatch), None)
    assert known.peak == 989.4 and known.flops is not None
    of_engine = Worker.of_policy(policy_on("NVIDIA H200", monkeypatch), None, lambda device: 7 * GIB)
    assert of_engine.state() == {"peak_gib": 7.0, "peak_tflops": 989.4}
    assert known.flops.parameters == 400, "a critic is another model"
    assert not caplog.records


@pytest.mark.parametrize("peak", [0.0, -989.4, float("inf"), float("nan")])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(SettingError, match=r"monitor\.peak_tflops is .*such as 989\.4, the card's dense bfloat16 peak"):
        Monitor(peak_tflops=peak)


def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is the system's value for the process, on CUDA the peak since the last call."""
    held = torch.ones(64 * 2**20)  # 256 MiB
    assert 0.25 < take_peak_memory(held.device) < 64
    resets: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    assert take_peak_memory(torch.device("cuda", 1)) == 3.0 and resets == [torch.device("cuda", 1)]
    assert take_peak_memory(torch.device("cuda", 1), lambda device: (2 + device.index) * GIB // 2) == 1.5
    usage = SimpleNamespace(ru_maxrss=2 * GIB)
    monkeypatch.setattr(throughput.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert take_peak_memory(torch.device("cpu")) == 2.0
    monkeypatch.setattr(sys, "platform", "linux")
    usage.ru_maxrss //= 1024
    assert take_peak_memory(torch.device("cpu")) == 2.0


# -- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    steps = [
        {"row_tokens": 300.0, "flops": 6e12, "train_seconds": 2.0},
        {"row_tokens": 100.0, "flops": 2e12, "train_seconds": 0.5},
    ]
    cards: list[dict[str, Any]] = [{"peak_gib": 3.0, "peak_tflops": 100.0}, {"peak_gib": 5.0, "peak_tflops": 60.0}]
    assert throughput_metrics(steps, cards) == pytest.approx(
        {
            "memory/peak_gib": 5.0,
            "throughput/train_tokens_per_second": 400 / 2.5,
            "throughput/mfu": 8 / (2.5 * 160),
        }
    )
    unknown = throughput_metrics(steps, [*cards, {"peak_gib": 1.0, "peak_tflops": None}])
    assert unknown.keys() == {"memory/peak_gib", "throughput/train_tokens_per_second"}
    nothing = {"row_tokens": 0.0, "flops": 0.0, "train_seconds": 0.1}
    assert throughput_metrics([nothing], cards) == throughput_metrics([], cards) == {"memory/peak_gib": 5.0}


def test_generated_tokens_by_hand() -> None:
    """Counts the tokens of all ranks, in the seconds of the slowest."""
    counts = []
    for lengths, seconds in (((3, 1), 2.0), ((5, 2), 4.0)):
        report = RolloutReport(0, "score")
        report.sampled([Group(0, group(0).problem, torch.tensor([1] * 50), [response((1,) * n) for n in lengths], 0)])
        counts.append(report.counts() | {"generate_seconds": seconds})
    assert rollout_metrics(of_all_ranks(counts))["throughput/generated_tokens_per_second"] == 11 / 4
    idle = of_all_ranks([RolloutReport(0, "score").counts() | {"generate_seconds": 0.0}] * 2)
    assert "throughput/generated_tokens_per_second" not in rollout_metrics(idle)


# -- in a training -------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "train/loss" in row]


def test_of_a_training(policy: Path, tmp_path: Path) -> None:
    """Rates times seconds give the counts. Without a card there is no utilisation."""
    monitor = Monitor()
    run = fit(policy, tmp_path, iterations=2, monitor=monitor)
    assert monitor._worker.take_bytes == run.data.engine.take_peak_bytes, "the engine knows what sleeps"
    for row in rows_of(tmp_path):
        tokens = row["throughput/train_tokens_per_second"] * row["time/train"]
        assert tokens > row["train/tokens"], "with prompts"
        assert tokens == pytest.approx(round(tokens), abs=1e-3)
        sampled = row["throughput/generated_tokens_per_second"] * row["time/generate"]
        assert sampled == pytest.approx(row["rollout/response_tokens"] * 40)
        assert row["memory/peak_gib"] > 0.05 and "throughput/mfu" not in row


@pytest.mark.slow
def test_two_ranks_count_as_one_process_does(config: Path, tmp_path: Path) -> None:
    """The same responses on one rank and on two give the same tokens and operations, and two cards' peak."""
    command = ["fit", "--config", config, *method("grpo"), "--data.engine", "helpers.tiny_models.EngineByProblem"]
    command += ["--data.minibatches", "1", "--data.problems_per_iteration", "8", "--trainer.max_epochs", "1"]
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        settings = ["--trainer.strategy", "ddp", "--monitor.peak_tflops", "0.25", "--run.folder", folder]
        one_node(ranks, *command, *settings, seconds=200)
        (row,) = rows_of(folder)
        tokens_per_second = row["throughput/train_tokens_per_second"]
        found.append(row["throughput/mfu"] * 0.25e12 * ranks / tokens_per_second)  # operations per token
        assert row["time/train"] * tokens_per_second >= row["train/tokens"]
    assert found[1] == pytest.approx(found[0])
