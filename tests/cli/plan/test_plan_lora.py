"""The plan of a run with adapters, checked against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plan import CRITIC, LAYER, TINY, GivenActivations, model

from popo_lightning.cli.plan.memory import estimate
from popo_lightning.cli.plan.optimizer_state import ADAM
from popo_lightning.cli.plan.run_settings import FSDP, TRANSFORMERS, Engine, RunSettings
from popo_lightning.core.errors import SettingError
from popo_lightning.model.lora import Lora

RANK = 4
LORA = Lora(r=RANK)
ADAPTERS = 2 * RANK * (4 * (64 + 64) + 3 * (64 + 96))  # two layers of four square matrices and three of 64 x 96
MATRICES = 2 * (LAYER - 2 * 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GivenActivations:
    return GivenActivations(model("tiny", tmp_path_factory.mktemp("tiny"), lora=LORA).architecture)


def settings(**changes: Any) -> RunSettings:
    usual = RunSettings(micro_batch_tokens=2048, on_gpu=False, optimizer=replace(ADAM, copies_in_step=0), lora=LORA)
    return replace(usual, **changes)


def test_adapters_alone_have_gradients_state_and_checkpoint(tiny: GivenActivations) -> None:
    shape = tiny.architecture
    assert (shape.parameters, shape.trained, shape.adapters) == (TINY + ADAPTERS, ADAPTERS, ADAPTERS)
    assert shape.matrices == MATRICES
    memory = estimate(settings(), tiny, None)
    assert memory.always["weights"] == 4 * (TINY + ADAPTERS) and memory.always["optimizer state"] == 8 * ADAPTERS
    assert memory.backward["gradients"] == memory.step["gradients"] == 4 * ADAPTERS
    assert memory.backward["logits of a chunk and the head's gradient"] == 2048 * 100 * 12, "a frozen head has none"
    assert memory.checkpoint == 12 * ADAPTERS


def test_adapters_are_float32_beside_bfloat16(tiny: GivenActivations) -> None:
    memory = estimate(settings(weight_dtype=torch.bfloat16), tiny, None)
    assert memory.always["weights"] == 2 * TINY + 4 * ADAPTERS
    assert memory.always["optimizer state"] == 8 * ADAPTERS and memory.backward["gradients"] == 4 * ADAPTERS
    assert memory.checkpoint == 12 * ADAPTERS


def test_four_bits(tiny: GivenActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.model.lora.find_spec", lambda name: name)
    run = settings(weight_dtype=torch.bfloat16, lora=Lora(r=RANK, four_bit=True))
    expected = 2 * (TINY - MATRICES) + MATRICES * (0.5 + 4 / 64) + 4 * ADAPTERS
    assert estimate(run, tiny, None).always["weights"] == int(expected)


def test_frozen_float32_matrices_are_cast_and_kept(tiny: GivenActivations) -> None:
    mixed = estimate(settings(autocast=True), tiny, None)
    assert mixed.backward["autocast copies of weights"] == 2 * (ADAPTERS + MATRICES)
    again = estimate(settings(autocast=True, gradient_checkpointing=True), tiny, None)
    assert again.backward["autocast copies of weights"] == 2 * ADAPTERS


def test_a_critic_has_adapters_of_its_own(tiny: GivenActivations) -> None:
    memory = estimate(settings(has_critic=True), tiny, None)
    assert memory.always["weights"] == 4 * (TINY + CRITIC + 2 * ADAPTERS)
    assert memory.backward["gradients"] == 4 * (2 * ADAPTERS + 65) and memory.checkpoint == 12 * (2 * ADAPTERS + 65)


def test_shards(tiny: GivenActivations) -> None:
    memory = estimate(settings(layout=FSDP, ranks=4), tiny, None)
    assert memory.always["weights"] == TINY + ADAPTERS and memory.always["optimizer state"] == 2 * ADAPTERS


def test_the_engine_has_no_adapters(tiny: GivenActivations) -> None:
    run = settings(engine=Engine(TRANSFORMERS, batch_size=1))
    assert estimate(run, tiny, None).engine.weights == 4 * TINY


def test_frozen_matrices_keep_less(tmp_path: Path) -> None:
    whole = model("tiny", tmp_path).activations(torch.float32, False)
    few = model("tiny", tmp_path, lora=Lora(target_modules=["q_proj"])).activations(torch.float32, False)
    every = model("tiny", tmp_path, lora=LORA).activations(torch.float32, False)
    assert few.layers < every.layers < whole.layers


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'qkv', which no layer"):
        _ = model("tiny", tmp_path, lora=Lora(target_modules=["qkv"])).architecture
