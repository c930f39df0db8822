"""Incomplete model folders: some work nevertheless, the others give one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import attached, random_model
from safetensors.torch import load_file, save_file
from torch import nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.model.loading import load_model, passes_states, remove_dropout, settle_modes
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.policy import PolicyModule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_model("llama-tied", tmp_path / "model")


def test_a_tokenizer_without_a_pad_token_works_with_its_end_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    encoder = PromptEncoder(folder, 16)
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id == 1
    assert encoder.encode(Problem("0", "3+4", None)).ids.tolist() == [5, 12, 6]


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_is_told_what_to_do(folder: Path, tmp_path: Path, tokenizer: bool) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    if tokenizer:
        for file in folder.glob("token*"):
            shutil.copy(file, adapter)
    for ask in (lambda: PolicyModule(path=str(adapter)).folder, lambda: load_model(adapter, torch.float32)):
        with pytest.raises(SettingError, match=r"an adapter .*; merge it into its base model \(peft: merge_and_unload"):
            ask()


def damaged(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "noise":
        file.write_bytes(b"not weights at all\n" * 99)
    elif how == "gone":
        file.unlink()
    elif how == "pickle":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"no pickle either")
    elif how == "empty pickle":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif how == "other shapes":
        save_file({name: torch.cat((weight, weight)) for name, weight in weights.items()}, file, {"format": "pt"})
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "config":
        (folder / "config.json").write_text("{not json")
    elif how == "model type":
        (folder / "config.json").write_text('{"model_type": "nobody_has_this"}')


CASES = ("cut", "noise", "gone", "pickle", "empty pickle", "other shapes", "folder", "config", "model type")


@pytest.mark.parametrize("how", CASES)
def test_damaged_weights_are_one_sentence(how: str, folder: Path) -> None:
    damaged(folder, how)
    with pytest.raises(SettingError) as refused:
        load_model(folder, torch.float32)
    said = str(refused.value)
    assert f"model.path is '{folder}', from which no model loads: " in said and "\n" not in said and len(said) < 600


def test_weights_that_are_missing_do_not_stay_random(folder: Path) -> None:
    """transformers would only warn, and train random weights."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = [name for name in weights if "layers.1.mlp" in name]
    save_file({name: weight for name, weight in weights.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(SettingError, match=rf"lack {min(lost)} and 2 more parameters of a LlamaForCausalLM"):
        load_model(folder, torch.float32)


class Layer(nn.Module):
    """Draws random numbers in training mode, as a router of experts does, and uses functional dropout."""

    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.1
        self.hidden_dropout = 0.2
        self.router = nn.Linear(2, 2)


def test_only_what_recomputes_activations_is_in_training_mode() -> None:
    model: Any = nn.Sequential(Layer(), nn.Linear(2, 2))
    settle_modes(model, checkpointing=True)
    assert [module.training for module in model.modules()] == [True, True, False, False]
    settle_modes(model, checkpointing=False)
    assert not any(module.training for module in model.modules())
    remove_dropout(model)
    assert model[0].dropout == model[0].hidden_dropout == 0


def test_gradient_checkpointing_recomputes(folder: Path) -> None:
    policy: Any = attached(PolicyModule(path=str(folder), gradient_checkpointing=True))
    layer, calls = policy.model.model.layers[0], []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert len(calls) == 2


def test_models_that_pass_states_on(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    for kind, expected in {"jamba": True, "lfm2": True, "qwen3_next": True, "mamba2": True, "gemma2": False}.items():
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        assert passes_states(tmp_path / kind) is expected, kind
    assert not passes_states(folder) and not passes_states(tmp_path / "nowhere")
