"""LoRA: what is trained, what an engine gets, what the reference is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import attached, fit, random_model, random_vision_model
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row
from popo_lightning.methods.remix import Reincarnation
from popo_lightning.model import policy_checkpoint
from popo_lightning.model.fingerprint import CHUNK, Fingerprint, fingerprint, sums_of
from popo_lightning.model.loading import load_model, load_trainable, vision_tower
from popo_lightning.model.lora import Lora, adapters, compact, without_adapters
from popo_lightning.model.padded_rows import PaddedRows, pad_rows
from popo_lightning.model.saved_weights import merged_weights
from popo_lightning.model.scoring import response_logprobs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL
from popo_lightning.policy import PolicyModule

SMALL = Lora(r=3, alpha=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama-tied", tmp_path_factory.mktemp("model"))


def module_of(folder: Path, lora: Lora | None = SMALL, **settings: Any) -> PolicyModule:
    return attached(PolicyModule(path=str(folder), lora=lora, **settings))


def moved(model: Any, seed: int = 0) -> Any:
    """Moves the adapters away from 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.copy_(torch.randn(adapter.shape, generator=draw) * 0.2)
    return model


def rows() -> PaddedRows:
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, 16, (n,), generator=draw) for n in (9, 6)]
    answers = [Response(each[3:], torch.zeros(len(each) - 3), "stop") for each in tokens]
    return pad_rows([Row(i, tokens[i][:3], answer) for i, answer in enumerate(answers)])


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        return response_logprobs(model, rows(), 1.0, (), False)[0]


def bits(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- what is trained -----------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing(folder: Path) -> None:
    plain, adapted = (
        load_trainable(folder, torch.float32, False),
        load_trainable(folder, torch.float32, False, lora=SMALL),
    )
    assert torch.equal(logprobs(plain), logprobs(adapted))
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == adapters(adapted).keys()
    assert len(adapters(adapted)) == 2 * 7 * 2, "two layers of seven matrices, A and B of each"


def test_adapters_are_trained_and_nothing_else(policy: Path, tmp_path: Path) -> None:
    before = bits(load_model(policy, torch.float32))
    run = fit(policy, tmp_path, model={"lora": SMALL}, lr=5e-3, iterations=2)
    after = bits(run.module.model)
    for name, weight in before.items():
        layer, _, last = name.rpartition(".")
        assert torch.equal(weight, after.get(name, after.get(f"{layer}.base_layer.{last}")))  # type: ignore[arg-type]
    assert all(float(after[name].abs().max()) > 0 for name in adapters(run.module.model)), "a B that is still 0"
    (group,) = run.module.optimizers().optimizer.param_groups  # type: ignore[union-attr]
    assert len(group["params"]) == len(adapters(run.module.model))
    assert all(row["engine/logp_gap_mean"] < 1e-5 for row in run.rows), "an engine that has not the merged weights"


def test_adapters_are_float32_beside_bfloat16(folder: Path) -> None:
    module = module_of(folder, dtype="bfloat16")
    assert {p.dtype for p in adapters(module.model).values()} == {torch.float32}
    assert {p.dtype for n, p in module.model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    assert module.compute_dtype == torch.bfloat16
    moved(module.model)
    assert {w.dtype for _, w in module.named_weights()} == {torch.bfloat16}


def test_the_seed_decides_and_the_process_draws_as_before(folder: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = adapters(load_trainable(folder, torch.float32, False, lora=SMALL))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again = adapters(load_trainable(folder, torch.float32, False, lora=SMALL))
    assert all(torch.equal(one[name], again[name]) for name in one)
    torch.manual_seed(6)
    other = adapters(load_trainable(folder, torch.float32, False, lora=SMALL))
    assert not torch.equal(*(each["model.layers.0.mlp.up_proj.lora_A.default.weight"] for each in (one, other)))


def test_recomputed_activations_give_the_same_gradients(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        module = module_of(folder, gradient_checkpointing=checkpointing)
        moved(module.model)
        module(rows())[0].sum().backward()
        found.append({name: p.grad for name, p in adapters(module.model).items()})
        assert all(float(gradient.abs().max()) > 0 for gradient in found[-1].values())  # type: ignore[union-attr]
        assert all(p.grad is None for p in module.model.parameters() if not p.requires_grad)
    torch.testing.assert_close(found[0], found[1])


# -- what an engine is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilized", [False, True])
def test_delivered_weights_are_sums_and_compute_the_same(folder: Path, stabilized: bool) -> None:
    lora = Lora(r=4, alpha=10, target_modules=["q_proj", "down_proj"], rank_stabilized=stabilized)
    module = module_of(folder, lora)
    plain = load_model(folder, torch.float32)
    given = dict(module.named_weights())
    assert given.keys() == dict(plain.named_parameters()).keys() and all(
        torch.equal(given[n], w) for n, w in bits(plain).items()
    )
    own = adapters(moved(module.model))
    name = "model.layers.1.self_attn.q_proj"
    scale = 5.0 if stabilized else 2.5
    product = own[f"{name}.lora_B.default.weight"] @ own[f"{name}.lora_A.default.weight"]
    given = dict(module.named_weights())
    torch.testing.assert_close(given[f"{name}.weight"], plain.get_submodule(name).weight + scale * product)
    assert torch.equal(given["model.layers.1.self_attn.k_proj.weight"], plain.model.layers[1].self_attn.k_proj.weight)
    first = logprobs(plain)
    plain.load_state_dict(given, strict=False)
    torch.testing.assert_close(logprobs(plain), logprobs(module.model), atol=2e-5, rtol=1e-5)
    assert float((logprobs(plain) - first).abs().max()) > 0.1, "the first policy's"


def test_peft_adds_up_the_same(folder: Path) -> None:
    from peft import get_peft_model

    model = moved(load_trainable(folder, torch.float32, False, lora=SMALL))
    theirs: Any = get_peft_model(load_model(folder, torch.float32), SMALL.config(list(model.adapted.targets)))
    theirs.load_state_dict({f"base_model.model.{n}": p for n, p in adapters(model).items()}, strict=False)
    expected = dict(theirs.merge_and_unload().named_parameters())
    found = dict(merged_weights(model, torch.float32))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name].detach(), atol=1e-6, rtol=1e-5)


def test_delayed_weights_are_kept_as_adapters(folder: Path) -> None:
    module = module_of(folder)
    moved(module.model, 1)
    then, kept = dict(module.named_weights()), module.kept_weights()
    assert kept.keys() == adapters(module.model).keys()
    moved(module.model, 2)
    again = dict(module.weights_kept(kept))
    assert all(torch.equal(again[name], weight) for name, weight in then.items())
    assert not torch.equal(
        again["model.layers.0.mlp.up_proj.weight"], dict(module.named_weights())["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2])
def test_delayed_rollouts_train(policy: Path, tmp_path: Path, interval: int) -> None:
    run = fit(policy, tmp_path, model={"lora": SMALL}, iterations=3, weight_sync_interval=interval, lr=2e-3)
    kept = run.data.state_dict()["rollout_weights"]["_kept"]
    assert kept.keys() == (adapters(run.module.model).keys() if interval == 2 else set())


# -- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_without_adapters(folder: Path) -> None:
    module = module_of(folder, regularizers=[KL(0.1)])
    assert module._reference == [], "a second model"
    first = logprobs(load_trainable(folder, torch.float32, False))
    moved(module.model)
    own = logprobs(module.model)
    assert torch.equal(module.reference_logprobs(rows()), first)  # type: ignore[arg-type]
    assert not torch.allclose(own, first) and torch.equal(logprobs(module.model), own), "adapters are on again"
    assert all(p.requires_grad for p in adapters(module.model).values())
    assert module_of(folder).reference_logprobs(rows()) is None


def test_adapters_come_back_after_an_error(folder: Path) -> None:
    model = moved(load_trainable(folder, torch.float32, False, lora=SMALL))
    own = logprobs(model)
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        raise ZeroDivisionError
    assert torch.equal(logprobs(model), own)


def test_a_kl_term_pulls_towards_the_base(policy: Path, tmp_path: Path) -> None:
    run = fit(
        policy, tmp_path, objective=Objective(regularizers=[KL(5.0)]), model={"lora": SMALL}, iterations=2, lr=5e-3
    )
    assert run.rows[-1]["train/grad_norm"] > 0


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_state_holds_adapters_alone_and_loads_into_another_module(folder: Path) -> None:
    module, other = module_of(folder), module_of(folder)
    moved(module.model)
    state = module.state_dict()
    assert state.keys() == {f"model.{name}" for name in adapters(module.model)}
    other.load_state_dict(state)
    assert torch.equal(logprobs(other.model), logprobs(module.model))
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: w for n, w in state.items() if n != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"model.more": torch.zeros(1)})


def test_another_base_or_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = module_of(folder, None).described
    own = module_of(folder).described

    def said(mine: Any, saved: Any) -> str:
        with pytest.raises(SettingError) as refused:
            policy_checkpoint.check(mine, saved, "there", True, False)
        return str(refused.value)

    policy_checkpoint.check(own, dict(own), "there", True, False)
    policy_checkpoint.check(
        whole, {n: v for n, v in whole.items() if n != policy_checkpoint.LORA}, "there", True, False
    )
    assert "model.lora is set, but the checkpoint holds all weights" in said(own, whole)
    assert "model.lora is null, but the checkpoint holds adapters alone" in said(whole, own)
    assert "model.lora.alpha is 6" in said(module_of(folder, Lora(r=3, alpha=6)).described, own)
    assert "model.lora.r is 4" in said(module_of(folder, Lora(r=4, alpha=12)).described, own)
    fewer = module_of(folder, Lora(r=3, alpha=12, target_modules=["q_proj"])).described
    assert "gives 2 layers an adapter, but the checkpoint has 14" in said(fewer, own)
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    for part in folder.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    model.save_pretrained(tmp_path)
    assert "other weights than those of model.path" in said(module_of(tmp_path).described, own), "by one bit"
    assert "other weights" in said(module_of(folder, dtype="bfloat16").described, own)


def test_fingerprints_know_bits_places_and_names() -> None:
    weight = torch.randn(CHUNK + 7, generator=torch.Generator().manual_seed(0))
    bits = weight.view(torch.int32).long()
    places = torch.arange(1, len(bits) + 1)
    assert sums_of(weight).tolist() == [int(bits.sum()), int((bits * places).sum())]
    swapped = weight.clone()
    swapped[[1, CHUNK + 3]] = weight[[CHUNK + 3, 1]]
    found = {fingerprint([("a", each)]) for each in (weight, swapped, weight.bfloat16(), weight.reshape(1, -1))}
    assert len(found | {fingerprint([("b", weight)])}) == 5 and fingerprint([("a", weight.clone())]) in found
    part = Fingerprint(whole=False), Fingerprint(whole=False)
    for each, of in zip(part, (weight, torch.cat((weight[:-1], torch.zeros(1)))), strict=True):
        assert len(list(each.of_each([("a", of)]))) == 1
    assert part[0].hexdigest() == part[1].hexdigest() != found


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["k_proj", "qkv"], "'qkv', which no layer of .* is called; its linear layers are .*q_proj"),
        (["lm_head"], "lm_head of .*, the output head; only linear layers"),
        (["embed_tokens"], "embed_tokens of .*, a Embedding; only linear layers"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_named(folder: Path, targets: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        load_trainable(folder, torch.float32, False, lora=Lora(target_modules=targets))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "model.lora.r is 0; it must be a finite number of at least 1, a rank"),
        ({"alpha": 0.0}, "model.lora.alpha is 0.0"),
        ({"alpha": float("inf")}, "model.lora.alpha is inf"),
        ({"target_modules": "q_proj"}, "model.lora.target_modules is 'q_proj'; use all-linear, or a list"),
        ({"target_modules": []}, "model.lora.target_modules is empty"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        Lora(**settings)


@pytest.mark.parametrize(
    ("settings", "largest"), [({"r": 100000}, 64), ({"r": 65}, 64), ({"r": 33, "target_modules": ["k_proj"]}, 32)]
)
def test_a_rank_above_every_matrix_is_refused(folder: Path, settings: dict[str, Any], largest: int) -> None:
    words = rf"model\.lora\.r is {settings['r']}, but no matrix .* above {largest}, its smaller side; use at most"
    with pytest.raises(SettingError, match=words):
        load_trainable(folder, torch.float32, False, lora=Lora(**settings))


def test_a_rank_above_some_matrices_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_trainable(folder, torch.float32, False, lora=Lora(r=32))
    assert not caplog.text
    load_trainable(folder, torch.float32, False, lora=Lora(r=64))
    (record,) = caplog.records
    assert record.message.startswith("model.lora.r is 64, but 4 of the 14 matrices with an adapter have a smaller side")


def test_four_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.model.lora.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="bitsandbytes is not installed; pip install bitsandbytes, or leave it out"):
        Lora(four_bit=True)


def test_four_bits_train_and_are_sent_as_they_compute(policy: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="4 bits are made by bitsandbytes, which is not installed")
    run = fit(policy, tmp_path, model={"lora": Lora(r=3, alpha=12, four_bit=True)}, iterations=2, lr=5e-3)
    layer = run.module.model.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    assert all(row["engine/logp_gap_mean"] < 1e-5 for row in run.rows), "rounded weights are sent, with their adapters"
    assert run.module.state_dict().keys() == {f"model.{name}" for name in adapters(run.module.model)}
    assert not run.module.as_loaded


def test_a_frozen_vision_tower_gets_none(tmp_path: Path) -> None:
    folder = random_vision_model(tmp_path)
    for freeze in (True, False):
        model = load_trainable(folder, torch.float32, freeze, lora=SMALL)
        inside = {id(p) for p in vision_tower(model).parameters()}  # type: ignore[union-attr]
        assert freeze == (not any(id(p) in inside for p in adapters(model).values()))
        assert any(id(p) not in inside for p in adapters(model).values())
    with pytest.raises(SettingError, match=r"a part of the vision tower, but model\.freeze_vision is true"):
        load_trainable(folder, torch.float32, True, lora=Lora(target_modules=["qkv"]))


def test_names_are_shortened_only_where_they_mean_the_same() -> None:
    names = ["a.q", "a.k", "b.q", "b.k"]
    assert compact(["a.q", "b.q"], names) == ["q"] and compact(["a.q"], names) == ["a.q"]


def test_an_exchanged_reference_is_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"Reincarnation, .*model\.lora"):
        fit(
            policy,
            tmp_path,
            objective=Objective(regularizers=[KL(0.1)]),
            model={"lora": SMALL},
            callbacks=[Reincarnation(1)],
            iterations=1,
        )
