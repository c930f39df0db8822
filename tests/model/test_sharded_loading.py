"""With FSDP2 only rank 0 reads the model, and every rank has the same bits as if it had read it itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.processes import on_two_ranks, trainer_of, whole_tensors
from helpers.tiny_models import random_model, random_vision_model
from torch.distributed.tensor import DTensor

from popo_lightning.core.errors import SettingError
from popo_lightning.methods.remix import ConvexKL
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.critic import Critic
from popo_lightning.model.loading import load_trainable
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.policy import PolicyModule


def loaded_on_this_rank(folder: Path, **settings: Any) -> tuple[PolicyModule, int]:
    """Loads a module as a trainer does. Returns it and how often this rank read the model."""
    read: list[Path] = []

    def counted(*arguments: Any) -> Any:
        read.append(arguments[0])
        return load_trainable(*arguments)

    module = PolicyModule(path=str(folder), **settings)
    with mock.patch("popo_lightning.model.policy_model.load_trainable", counted):
        trainer_of("fsdp2", 2, 0, []).validate(module, [], verbose=False)
    return module, len(read)


def with_everything(folder: Path, **settings: Any) -> PolicyModule:
    """Returns a policy with a critic and a reference."""
    settings |= {"critic": Critic(), "advantage": GAE(), "regularizers": [ConvexKL(0.1)]}
    module, read = loaded_on_this_rank(folder, **settings)
    assert read == (1 if module.trainer.global_rank == 0 else 0)
    return module


def compare(folder: Path, **settings: Any) -> dict[str, Any]:
    """Returns the differences between the split models and those that this rank reads whole."""
    split = with_everything(folder, **settings)
    whole = PolicyModule(path=str(folder), **settings | {"critic": Critic(), "advantage": GAE()})
    freeze_vision = settings.get("freeze_vision", False)
    dtype = split.weight_dtype
    whole._take(load_trainable(folder, dtype, freeze_vision))
    reference = load_trainable(folder, dtype, freeze_vision).requires_grad_(False)
    pairs = {
        "policy": (split.model, whole.model),
        "value model": (split.value_model, whole.value_model),
        "reference": (split._reference[0], reference),
    }
    wrong: list[str] = []
    for kind, (found, expected) in pairs.items():
        wrong += [f"{kind} {name}" for name in differences(found, expected)]
        if kind != "value model":
            tied = found.lm_head.weight is found.get_input_embeddings().weight
            wrong += [kind] * (tied != expected.config.get_text_config().tie_word_embeddings)
            wrong += [f"{kind} generation"] * (found.generation_config != expected.generation_config)
            wrong += [f"{kind} attention"] * (found.config._attn_implementation != expected.config._attn_implementation)
    dropouts = [m.p for m in split.modules() if isinstance(m, torch.nn.Dropout)]
    dropouts += [m.attention_dropout for m in split.modules() if hasattr(m, "attention_dropout")]
    return {
        "wrong": wrong,
        "dropouts": dropouts,
        "described": split.described == policy_checkpoint.describe(whole) | policy_checkpoint.origin(split.path),
        "trained": [name for name, p in split.named_parameters() if p.requires_grad],
        "checkpointing": [m.is_gradient_checkpointing for m in (split.model, split.value_model.base)],
        "compiled": sum(getattr(m, "_compiled_call_impl", None) is not None for m in split.model.modules()),
        "training": (split.model.training, split.value_model.training),
        "tensors": sum(isinstance(p, DTensor) for p in split.parameters()),
    }


def differences(found: torch.nn.Module, expected: torch.nn.Module) -> list[str]:
    """Returns names of parameters and buffers that differ in any bit."""
    different = []
    for kind in ("named_parameters", "named_buffers"):
        own = whole_tensors(getattr(found, kind)())
        other = whole_tensors(getattr(expected, kind)())
        different += sorted(own.keys() ^ other.keys())
        for name in own.keys() & other.keys():
            same_type = own[name].dtype == other[name].dtype
            different += [] if same_type and torch.equal(own[name], other[name]) else [name]
    different += sorted(found.state_dict().keys() ^ expected.state_dict().keys())
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (found, expected)]
    return different + [name for name in flags[0] if flags[0][name] != flags[1].get(name)]


def compare_all(text: Path, untied: Path, vision: Path) -> list[dict[str, Any]]:
    return [
        compare(text, gradient_checkpointing=True),
        compare(untied, dtype="bfloat16", compile_layers=True),
        compare(vision, freeze_vision=True),
        compare(vision),
    ]


@pytest.mark.slow
def test_every_bit_is_the_plain_load_s(tmp_path: Path) -> None:
    text = random_model("llama-tied", tmp_path / "text")
    untied = random_model("llama-untied", tmp_path / "untied")
    vision = random_vision_model(tmp_path / "vision")
    for found in on_two_ranks(compare_all, tmp_path / "ranks", text, untied, vision, seconds=300):
        for case in found:
            assert case["wrong"] == [] and case["described"] and case["tensors"] > 30
            assert set(case["dropouts"]) == {0.0}
        tied, plain, frozen, seeing = found
        assert tied["checkpointing"] == [True, True] and tied["training"] == (True, True)
        assert plain["checkpointing"] == [False, False] and plain["training"] == (False, False)
        assert [case["compiled"] for case in found] == [0, 2, 0, 0]
        assert not any("visual" in name for name in frozen["trained"])
        assert any("visual" in name for name in seeing["trained"])


def refusal(folder: Path) -> str:
    try:
        loaded_on_this_rank(folder)
    except SettingError as error:
        return str(error)
    return "nothing"


def unforeseen(folder: Path) -> str:
    with mock.patch("popo_lightning.model.policy_model.load_trainable", side_effect=RuntimeError("out of luck")):
        try:
            trainer_of("fsdp2", 2, 0, []).validate(PolicyModule(path=str(folder)), [], verbose=False)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def all_refusals(broken: Path, damaged: Path, whole: Path) -> list[str]:
    return [refusal(broken), refusal(damaged), unforeseen(whole)]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Returns both ranks' errors for a folder without a model, for damaged weights, and when only rank 0 failed."""
    broken, damaged, whole = (tmp_path_factory.mktemp(name) for name in ("broken", "damaged", "whole"))
    for file in random_model("qwen2", damaged).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    first, second = on_two_ranks(
        all_refusals, tmp_path_factory.mktemp("ranks"), broken, damaged, random_model("qwen2", whole)
    )
    return list(zip(first, second, strict=True))


def test_what_rank_0_cannot_load_is_one_sentence_on_all(refused: list[tuple[str, str]]) -> None:
    for said in refused[0]:
        assert "model.path is" in said and "no model loads" in said


def test_damaged_weights_are_one_sentence_on_all(refused: list[tuple[str, str]]) -> None:
    for said in refused[1]:
        assert re.search(r"model.path is '.*damaged\d*'", said) and "no model loads" in said


def test_nobody_waits_for_a_rank_that_cannot_load(refused: list[tuple[str, str]]) -> None:
    first, other = refused[2]
    assert first == "RuntimeError: out of luck"
    assert other == "SettingError: no model loads on rank 0: out of luck"


def memory(folder: Path) -> tuple[float, float]:
    """Returns MB of host memory that loading takes at its peak, and MB that stay in use."""
    from transformers import LlamaForCausalLM  # noqa: F401  # its memory is none of the model's

    loaded_on_this_rank(folder / "small")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = _status("VmRSS")
    kept = loaded_on_this_rank(folder / "large")
    assert len(list(kept[0].parameters())) > 100
    return _status("VmHWM") - start, _status("VmRSS") - start


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_only_rank_0_ever_holds_the_whole_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    for name, hidden, count in (("small", 64, 2), ("large", 512, 12)):
        config = LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=count, **sizes)
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        megabytes = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert 150 < megabytes < 250
    (first, _), (second, kept) = on_two_ranks(memory, tmp_path / "ranks", tmp_path, seconds=300)
    print(f"{megabytes:.0f} MB: rank 0 took {first:.0f} MB, rank 1 {second:.0f} MB and kept {kept:.0f} MB")
    assert first > 0.9 * megabytes, "of one reading the model the measure must show it"
    assert second < 0.8 * megabytes
