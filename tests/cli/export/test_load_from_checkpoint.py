"""PolicyModule.load_from_checkpoint loads a policy with its run's settings, without the model at the run's start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.exports import as_shards, newest, policy_weights, same_bits, tensors
from helpers.tiny_models import method, popo, tiny_task

from popo_lightning.cli.export.rebuilt_model import rebuilt
from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.model.critic import Critic
from popo_lightning.model.loading import load_trainable
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.regularizers import KL
from popo_lightning.objectives.weights import TruncatedIS
from popo_lightning.policy import PolicyModule


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded") / "run"
    more = ["--data.temperature", "0.9", "--model.max_grad_norm", "0.5"]
    popo("fit", "--config", config, *method("popo"), *more, "--run.folder", folder, "--trainer.max_epochs", 2)
    return folder


def weights(module: PolicyModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.model.named_parameters()}


@pytest.mark.parametrize("kind", ["run", "file", "shards"])
def test_weights_and_settings_of_the_run(run: Path, tmp_path: Path, kind: str) -> None:
    shards = tmp_path / "a.ckpt"
    place = {"run": run, "file": newest(run), "shards": shards}[kind]
    if kind == "shards":
        as_shards(newest(run), shards)
    module = PolicyModule.load_from_checkpoint(place)
    kept = policy_weights(newest(run))
    assert all(same_bits(weight, kept[name]) for name, weight in weights(module).items())
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert isinstance(module.objective.behave_weight, TruncatedIS) and module.objective.behave_weight.cap == 2.0
    assert (module.temperature, module.max_grad_norm) == (0.9, 0.5)
    (group,) = module.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-3, 0.0)
    assert module.restored and module.model.generation_config.eos_token_id == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_buffers_are_those_of_the_run(run: Path, policy: Path, tmp_path: Path, dtype: str) -> None:
    """Rotary frequencies are float32 beside weights of any type, and another type rounds the weights alone."""
    copy = tmp_path / "half.ckpt"
    state = torch.load(newest(run), weights_only=True)
    state["state_dict"] = {name: weight.bfloat16() for name, weight in state["state_dict"].items()}
    torch.save(state, copy)
    module = PolicyModule.load_from_checkpoint(copy, dtype=dtype)
    trained = load_trainable(policy, getattr(torch, dtype), False)
    own, expected = dict(module.model.named_buffers()), dict(trained.named_buffers())
    assert own.keys() == expected.keys() and all(same_bits(own[name], expected[name]) for name in own)
    for name, weight in weights(module).items():
        assert same_bits(weight, state["state_dict"][f"model.{name}"].to(getattr(torch, dtype)))
    trained.load_state_dict({n.removeprefix("model."): w for n, w in state["state_dict"].items()}, strict=False)
    ids = torch.arange(3, 15)[None]
    assert same_bits(module.model(ids).logits, trained(ids).logits)


def test_buffers_have_the_type_of_the_weights() -> None:
    """Gemma's scale of embeddings is a buffer, which the type of the configuration would round."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 16, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
    model = Gemma3ForCausalLM(config).float()
    scale = rebuilt(config, model.state_dict()).model.embed_tokens.embed_scale
    with pytest.raises(SettingError, match="another model"):
        rebuilt(config, {})
    assert scale.dtype == torch.float32 and float(scale) == pytest.approx(24**0.5, rel=1e-6)


def test_no_warm_start_is_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "empty"))
    module = PolicyModule.load_from_checkpoint(newest(run))
    assert not (tmp_path / "empty").exists()
    kept = policy_weights(newest(run))
    assert all(same_bits(weight, kept[name]) for name, weight in weights(module).items())
    ids = torch.tensor([[2, 3, 4]])
    assert torch.isfinite(module.model(ids).logits).all()


def test_arguments_go_before_the_settings(run: Path, policy: Path, config: Path) -> None:
    module = PolicyModule.load_from_checkpoint(
        newest(run), path=str(policy), advantage=GroupNormalized(normalize_by_std=False), strict=True
    )
    assert module.warm_start is None and module.path == str(policy) and not module.advantage.normalize_by_std  # type: ignore[attr-defined]
    assert module.described["policy_folder"] == str(policy), "of which a checkpoint of it would say so"
    assert PolicyModule.load_from_checkpoint(run, map_location="meta").model.device.type == "meta"
    with pytest.raises(SettingError, match="which does not exist"):
        PolicyModule.load_from_checkpoint("nowhere.ckpt")


def test_it_trains_and_evaluates(run: Path, tmp_path: Path) -> None:
    """The first evaluation equals the last one of the run, because the policy is the same."""
    module = PolicyModule.load_from_checkpoint(run)
    sizes: dict[str, Any] = {"problems_per_iteration": 8, "max_new_tokens": 10, "max_prompt_tokens": 16}
    data = RolloutDataModule(tiny_task(), TransformersEngine(), **sizes, temperature=module.temperature)
    evaluation = Evaluation(samples=2, avg_k=2, pass_k=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[evaluation],
    )
    before = {name: weight.clone() for name, weight in weights(module).items()}
    trainer.fit(module, data)
    assert any(not torch.equal(before[name], weight) for name, weight in weights(module).items())
    last = json.loads((run / "evaluations" / "iteration-000002" / "results.json").read_text())
    numbers = last["benchmarks"]["countdown"]["numbers"]
    assert evaluation.history[0]["eval/countdown/greedy"] == numbers["greedy"]
    assert greedy_texts(tmp_path, 0) == greedy_texts(run, 2)


def greedy_texts(folder: Path, iteration: int) -> list[str]:
    lines = (folder / "evaluations" / f"iteration-{iteration:06d}" / "countdown.jsonl").read_text().splitlines()
    return [row["response"] for row in map(json.loads, lines) if row["greedy"]]


def test_the_reference_is_the_model_that_the_run_began_with(
    run: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regularizers = [KL(0.1)]
    module = PolicyModule.load_from_checkpoint(run, regularizers=regularizers)
    (reference,) = module._reference
    began = tensors(policy)
    assert all(same_bits(weight.detach(), began[name]) for name, weight in reference.named_parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "empty"))
    with pytest.raises(SettingError, match="no longer in"):
        PolicyModule.load_from_checkpoint(run, regularizers=regularizers)


def test_a_critic_comes_with_its_weights(config: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    popo("fit", "--config", config, *method("ppo"), "--run.folder", folder, "--trainer.max_epochs", 1)
    module = PolicyModule.load_from_checkpoint(folder)
    saved: dict[str, Any] = torch.load(newest(folder), weights_only=True)["state_dict"]
    for name, parameter in module.value_model.named_parameters():
        assert same_bits(parameter.detach(), saved[f"value_model.{name}"])
    assert module.value_model.head.weight.abs().max() > 0
    with pytest.raises(SettingError, match="has no value model"):
        PolicyModule.load_from_checkpoint(run, critic=Critic(), advantage=GAE())


def test_settings_that_are_no_longer_known(run: Path, tmp_path: Path) -> None:
    """A setting names a class that does not exist here, as in a checkpoint from another machine."""
    copy = tmp_path / "copy.ckpt"
    shutil.copy(newest(run), copy)
    state = torch.load(copy, weights_only=True)
    settings = state["callbacks"]["RunKeeper"]["run"]["settings"]
    settings["model.advantage.class_path"] = '"nowhere.Advantage"'
    torch.save(state, copy)
    with pytest.raises(SettingError, match=r"model of the run cannot be built here .*nowhere"):
        PolicyModule.load_from_checkpoint(copy)
    assert PolicyModule.load_from_checkpoint(copy, advantage=GroupNormalized()).restored


def test_another_temperature_is_refused(run: Path, tmp_path: Path) -> None:
    module = PolicyModule.load_from_checkpoint(run)
    data = RolloutDataModule(tiny_task(), TransformersEngine(), problems_per_iteration=8, temperature=0.5)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(SettingError, match=r"data\.temperature is 0\.5, but model\.temperature.* is 0\.9"):
        trainer.fit(module, data)
