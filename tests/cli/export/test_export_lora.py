"""A run of adapters exports a merged policy or a peft adapter, which can be sampled and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import (
    PLAIN,
    VLLM,
    answers_by,
    as_shards,
    exported,
    greedy_rows,
    newest,
    policy_weights,
    refused,
    said_by,
    same_bits,
    state_of,
    tensors,
)
from helpers.tiny_models import method, popo, random_model
from torch import Tensor

from popo_lightning.cli.export.adapted_policy import write_adapter
from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import layers, load_trainable
from popo_lightning.model.lora import Lora, adapters, without_adapters
from popo_lightning.objectives.regularizers import KL
from popo_lightning.policy import PolicyModule

LORA = ["--model.lora", "{r: 3, alpha: 12, target_modules: [q_proj, up_proj, down_proj]}"]


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    popo("fit", "--config", config, *method("popo"), *LORA, "--run.folder", folder, "--trainer.max_epochs", 2)
    return folder


def sums(run: Path, policy: Path) -> dict[str, Tensor]:
    """Computes W + alpha / r B A by hand."""
    base, own = tensors(policy), policy_weights(newest(run))
    for name in {name.partition(".lora_")[0] for name in own}:
        product = own[f"{name}.lora_B.default.weight"] @ own[f"{name}.lora_A.default.weight"]
        base[f"{name}.weight"] = base[f"{name}.weight"] + 4.0 * product
    return base


def test_merged_weights_are_the_sums(run: Path, policy: Path, tmp_path: Path) -> None:
    assert "after iteration 2" in exported(run, tmp_path / "out")
    found, expected, before = tensors(tmp_path / "out"), sums(run, policy), tensors(policy)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-7, rtol=1e-5)
        assert same_bits(weight, before[name]) == (name.split(".")[-2] not in ("q_proj", "up_proj", "down_proj"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "lora" not in json.dumps(config)
    exported(run, tmp_path / "half", "--dtype", "bfloat16")
    half = tensors(tmp_path / "half")
    assert all(same_bits(half[name], weight.bfloat16()) for name, weight in found.items()), "rounded once"


def test_shards_give_the_same(run: Path, tmp_path: Path) -> None:
    shards = as_shards(newest(run), tmp_path / "epoch=1-step=6.ckpt")
    exported(run, tmp_path / "one")
    exported(shards, tmp_path / "other")
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


# -- matrices of 4 bits ------------------------------------------------------------------------------------------------


class Packed(torch.nn.Linear):
    """In place of bitsandbytes' Linear4bit: a weight that is bytes until it is asked for, and then what it was."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = torch.nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False)
        self.weight.quant_state = linear.weight.dtype  # type: ignore[attr-defined]
        self.bias = linear.bias


def pack(model: Any) -> None:
    for layer in layers(model):
        for name, linear in list(layer.named_modules()):
            if type(linear) is torch.nn.Linear:
                place, _, own = name.rpartition(".")
                setattr(layer.get_submodule(place), own, Packed(linear))
    model.is_loaded_in_4bit = True


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.model.lora.find_spec", lambda name: name)
    monkeypatch.setattr("popo_lightning.model.four_bit.quantize", pack)
    monkeypatch.setattr("popo_lightning.model.four_bit.dequantized", lambda weight: weight.view(weight.quant_state))


def test_matrices_of_four_bits_become_whole(run: Path, policy: Path, tmp_path: Path, packed: None) -> None:
    """Those without an adapter, too: nobody outside could read them."""
    checkpoint = tmp_path / "a.ckpt"
    state = state_of(newest(run))
    state["policy_lora"]["four_bit"] = True
    torch.save(state, checkpoint)
    exported(checkpoint, tmp_path / "out")
    found, expected, before = tensors(tmp_path / "out"), sums(run, policy), tensors(policy)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-7, rtol=1e-5)
        assert same_bits(weight, before[name]) == (name.split(".")[-2] not in ("q_proj", "up_proj", "down_proj"))
    assert "quant" not in (tmp_path / "out" / "config.json").read_text()


def test_an_adapter_of_some_layers_names_them_beside_four_bits(policy: Path, tmp_path: Path, packed: None) -> None:
    chosen = "model.layers.0.self_attn.q_proj"
    for four_bit in (False, True):
        lora = Lora(target_modules=["0.self_attn.q_proj"], four_bit=four_bit)
        write_adapter(load_trainable(policy, torch.float32, False, lora=lora), tmp_path, "base")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == [chosen], "q_proj would be that of every layer"


@pytest.mark.slow
@pytest.mark.parametrize("library", [PLAIN, pytest.param(VLLM, marks=pytest.mark.vllm)], ids=["transformers", "vllm"])
def test_others_give_the_last_evaluations_answers(library: str, run: Path, tmp_path: Path) -> None:
    """So their greedy accuracy is the evaluation's."""
    exported(run, tmp_path / "out")
    rows = greedy_rows(run)
    answers = [row["response"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert answers_by(library, tmp_path / "out", 10, prompts, tmp_path) == [answers]


def test_an_adapter_is_peft_s(run: Path, policy: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported(run, tmp_path / "adapter", "--adapter")
    kept = policy_weights(newest(run))
    written = tensors(tmp_path / "adapter")
    assert written.keys() == {f"base_model.model.{name.replace('.default.', '.')}" for name in kept}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 12, "LORA")
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "up_proj"]
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(policy)
    adapted: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    exported(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=2e-5, rtol=1e-5)


def test_what_makes_no_sense_is_refused(run: Path, config: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    popo("fit", "--config", config, *method("grpo"), "--run.folder", whole, "--trainer.max_epochs", 1)
    assert "--adapter is given, but the checkpoint" in refused("export", whole, tmp_path / "out", "--adapter")
    assert "--dtype is bfloat16, but --adapter" in refused(
        "export", run, tmp_path / "out", "--adapter", "--dtype", "bfloat16"
    )
    other = random_model("llama-tied", tmp_path / "other")
    assert "adapters belong to other weights" in refused("export", run, tmp_path / "out", "--base", other)
    with pytest.raises(SettingError, match=r"lora is set, but the checkpoint .* holds all weights"):
        PolicyModule.load_from_checkpoint(whole, lora=Lora())
    with pytest.raises(SettingError, match=r"lora is None, but the checkpoint .* holds adapters alone"):
        PolicyModule.load_from_checkpoint(run, lora=None)
    assert not (tmp_path / "out").exists()


def test_a_policy_is_asked(run: Path) -> None:
    row = greedy_rows(run)[0]
    code, out, err = said_by("sample", run, row["prompt"], "--temperature", "0")
    assert code == 0, err
    assert row["response"] in out


@pytest.mark.parametrize("kind", ["run", "shards"])
def test_load_from_checkpoint(run: Path, policy: Path, tmp_path: Path, kind: str) -> None:
    place = run if kind == "run" else as_shards(newest(run), tmp_path / "a.ckpt")
    module = PolicyModule.load_from_checkpoint(place, regularizers=[KL(0.1)])
    kept = policy_weights(newest(run))
    found = adapters(module.model)
    assert found.keys() == kept.keys() and all(same_bits(found[name].detach(), kept[name]) for name in kept)
    assert module.restored and module.lora == Lora(3, 12, ["q_proj", "up_proj", "down_proj"])
    assert module.state_dict().keys() == {f"model.{name}" for name in kept}
    ids = torch.arange(3, 15)[None]
    from popo_lightning.model.loading import load_model

    with torch.no_grad(), without_adapters(module.model):
        torch.testing.assert_close(
            module.model(input_ids=ids).logits, load_model(policy, torch.float32)(input_ids=ids).logits
        )
