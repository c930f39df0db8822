"""Log-probs of padded rows, and a gradient that depends neither on padding nor on micro-batches."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import attached, fit, slots, weights_of
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.timing import PhaseClock
from popo_lightning.model import logprobs
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import EntropyBonus
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalSnapshot
from popo_lightning.training.token_sums import token_metrics

VOCABULARY = 37
FLOAT32 = {"atol": 3e-6, "rtol": 1e-6}  # several roundings of a log-prob whose integer part takes a few bits


# -- log-probs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a random model with peaked distributions. It has no tokenizer, because the policy needs none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def policy(folder: Path, **settings: Any) -> PolicyModule:
    """Returns a policy in float64, so that differences come from the code and not from rounding."""
    module = attached(PolicyModule(path=str(folder), max_grad_norm=None, **settings))
    module.model.double()
    return module


@pytest.fixture
def minibatch() -> Minibatch:
    """Returns three groups with prompts and responses of many lengths. Two groups are replayed."""
    draw = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(1, VOCABULARY, (length,), generator=draw)

    groups = []
    for id, (prompt, lengths) in enumerate([(2, (3, 1, 6)), (7, (9, 4)), (1, (1, 2, 11))]):
        answers = [
            Response(tokens(n), -3 * torch.rand(n, generator=draw), "stop", "", {"score": float(i), "acc": 0.0})
            for i, n in enumerate(lengths)
        ]
        groups.append(Group(id, group(id).problem, tokens(prompt), answers, version=4 - id))
    return Minibatch(groups, version=4, index=0)


def plain(module: PolicyModule, minibatch: Minibatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (log-probs, entropies) of each response by the textbook: one row, all logits, no padding."""
    for r in minibatch.rows():
        ids = torch.cat((r.prompt_ids, r.response.token_ids))
        logits = module.model(input_ids=ids[None]).logits[0] / module.temperature
        logits[:, module.forbidden_token_ids] = -torch.inf
        logp = logits.log_softmax(-1)[len(r.prompt_ids) - 1 : -1]
        p = logp.exp()
        yield logp.gather(1, r.response.token_ids[:, None])[:, 0], -(p * logp.masked_fill(p == 0, 0)).sum(-1)


@pytest.mark.parametrize("chunk", [2**25, VOCABULARY, 5 * VOCABULARY])
@pytest.mark.parametrize(("temperature", "forbidden"), [(1.0, []), (0.6, []), (1.7, [0])])
def test_log_probs_and_entropy_are_the_textbook_ones(
    folder: Path,
    minibatch: Minibatch,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    forbidden: list[int],
    chunk: int,
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    module = policy(folder, temperature=temperature)
    module.forbidden_token_ids = forbidden
    rows = pad_rows(minibatch.rows())
    logp, entropy = module(rows)
    assert logp.dtype == entropy.dtype == torch.float32 and logp.shape == entropy.shape == rows.mask.shape
    assert not logp[~rows.mask].any() and not entropy[~rows.mask].any()
    for i, (expected_logp, expected_entropy) in enumerate(plain(module, minibatch)):
        torch.testing.assert_close(logp[i][rows.mask[i]].double(), expected_logp, **FLOAT32)
        torch.testing.assert_close(entropy[i][rows.mask[i]].double(), expected_entropy, **FLOAT32)
    assert logp[rows.mask].std() > 1  # nearly equal values would prove little


def test_forbidden_tokens_take_no_probability() -> None:
    head = torch.nn.Linear(3, 4, bias=False)
    targets = torch.tensor([0, 1, 3])
    with torch.no_grad():
        head.weight.zero_()
        logp, entropy = logprobs.token_logprobs(torch.ones(3, 3), head, targets, 1.0, [3])
    third = torch.log(torch.tensor(1 / 3))
    torch.testing.assert_close(logp[:2], third.expand(2))
    torch.testing.assert_close(entropy, -third.expand(3))
    assert logp[2] < -1e8


def test_mixed_precision_rounds_logits_and_nothing_after_them() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(9, 16), torch.randint(0, 50, (9,))
    head = torch.nn.Linear(16, 50, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = logprobs.token_logprobs(hidden, head, targets, 1.0)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), expected.gather(-1, targets[:, None])[:, 0], **FLOAT32)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), **FLOAT32)


@pytest.mark.parametrize(
    ("vocabulary", "device", "rows"),
    [
        (2**26, "cpu", 1),
        (151_936, "cpu", 220),
        (49_152, "cpu", 170),
        (49_152, "cuda", 2730),
        (262_144, "cuda", 512),
        (2**28, "cuda", 1),
        (32, "cpu", 262_144),
    ],
)
def test_chunks_on_a_cpu_are_small_but_of_many_rows(vocabulary: int, device: str, rows: int) -> None:
    assert logprobs.chunk_rows(vocabulary, torch.device(device)) == rows


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_head_never_sees_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch, entropy_gradient: bool) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 7 * 3)
    head = torch.nn.Linear(5, 7, bias=False)
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    states = torch.randn(11, 5, requires_grad=True)
    logp, _ = logprobs.token_logprobs(states, head, torch.arange(11) % 7, 1.0, (), entropy_gradient)
    assert seen == [3, 3, 3, 2]
    logp.sum().backward()
    assert sorted(seen[4:]) == [2, 3, 3, 3]  # recomputed, and not kept in between


def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(11, 5), torch.randint(0, 7, (11,))
    head = torch.nn.Linear(5, 7, bias=False)

    def found(chunk: int, entropy_gradient: bool) -> list[Tensor]:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
        states = hidden.clone().requires_grad_()
        head.weight.grad = None
        logp, entropy = logprobs.token_logprobs(states, head, targets, 0.8, (6,), entropy_gradient)
        assert entropy.requires_grad == entropy_gradient
        ((logp * torch.arange(11)).sum() + 3 * entropy.sum()).backward()
        assert states.grad is not None and head.weight.grad is not None
        return [logp, entropy, states.grad, head.weight.grad]

    for entropy_gradient in (False, True):
        whole = found(2**25, entropy_gradient)
        for rows in (1, 3, 10):
            torch.testing.assert_close(found(7 * rows, entropy_gradient), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found(7, True)[2], found(7, False)[2], atol=1e-3)


def test_logprobs_come_in_row_order_whatever_the_split(folder: Path, minibatch: Minibatch) -> None:
    for budget in (1, 20, 10_000):
        found = policy(folder, micro_batch_tokens=budget).logprobs(minibatch)
        assert len(found) == 8 and not any(logp.requires_grad for logp in found)
        for logp, (expected, _) in zip(found, plain(policy(folder), minibatch), strict=True):
            torch.testing.assert_close(logp.double(), expected.detach(), **FLOAT32)
    assert policy(folder).logprobs(Minibatch([], 0, 1)) == []


def test_proximal_snapshot_is_taken_of_later_minibatches_before_the_first_step(
    folder: Path, minibatch: Minibatch
) -> None:
    module, later = policy(folder), [Minibatch([group(0)], 4, 1), Minibatch([], 4, 2)]
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(pending=later, clock=PhaseClock()))
    ProximalSnapshot().on_train_batch_start(trainer, module, minibatch, 0)
    assert not minibatch.recorded and later[1].recorded["prox_logp"] == []
    snapshot = torch.stack(later[0].recorded["prox_logp"])
    expected = torch.stack([logp for logp, _ in plain(module, later[0])]).detach()
    torch.testing.assert_close(snapshot.double(), expected, **FLOAT32)
    with torch.no_grad():
        module.model.lm_head.weight.mul_(1.5)
    ProximalSnapshot().on_train_batch_start(trainer, module, later[0], 1)  # not recomputed during the iteration
    assert torch.equal(snapshot, torch.stack(later[0].recorded["prox_logp"]))
    assert set(trainer.datamodule.clock.take()) == {"prox"}


def test_fresh_rows_may_take_the_engines_log_probs(folder: Path, minibatch: Minibatch) -> None:
    """This applies only to whole groups of this iteration. Others, from older versions, are computed."""
    module = policy(folder)
    fresh = [version == minibatch.version for version in (group.version for group in minibatch.groups)]
    assert 0 < sum(fresh) < len(fresh)
    later = copy.deepcopy(minibatch)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(clock=PhaseClock(), pending=[later]))
    first = Minibatch([], minibatch.version, 0)
    ProximalSnapshot(recompute_fresh=False).on_train_batch_start(trainer, module, first, 0)
    assert not later.prox_is_start
    computed, place = module.logprobs(minibatch), 0
    for each, is_fresh in zip(minibatch.groups, fresh, strict=True):
        for response in each.responses:
            expected = response.behave_logp if is_fresh else computed[place]
            torch.testing.assert_close(later.recorded["prox_logp"][place], expected)
            place += 1


@pytest.mark.slow
def test_compiled_layers_give_the_same(folder: Path, minibatch: Minibatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    plain_module, compiled = policy(folder), policy(folder, compile_layers=True)
    for found, expected in zip(compiled.logprobs(minibatch), plain_module.logprobs(minibatch), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert any(getattr(module, "_compiled_call_impl", None) for module in compiled.model.modules())


# -- training ------------------------------------------------------------------------------------------------------


def train(module: PolicyModule, minibatch: Minibatch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Takes a training step of size 0 and returns its outputs and gradients."""
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value, model=module, root_device=torch.device("cpu"))
    optimizer = torch.optim.SGD(module.model.parameters(), lr=0.0)
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    patched: Any = module
    plugin = module.trainer.precision_plugin
    patched._trainer = SimpleNamespace(strategy=strategy, world_size=1, precision_plugin=plugin)
    patched.optimizers, patched.lr_schedulers = lambda: optimizer, lambda: None
    patched.manual_backward = lambda loss: loss.backward()
    outputs = module.training_step(minibatch, 0)
    assert all(p.grad is None for p in module.model.parameters()), "a gradient lives through the next generation"
    return outputs, found


def shown(outputs: dict[str, Any]) -> dict[str, float]:
    return token_metrics([outputs["tokens"]])


@pytest.mark.parametrize("with_prox", [False, True])
def test_gradient_does_not_depend_on_the_split(folder: Path, minibatch: Minibatch, with_prox: bool) -> None:
    objective = Objective(regularizers=[EntropyBonus(0.3)])
    whole = policy(folder, **slots(objective), micro_batch_tokens=10_000)
    if with_prox:  # another proximal policy
        now = whole.logprobs(minibatch)
        minibatch.recorded["prox_logp"] = [logp + 0.3 * torch.sin(torch.arange(len(logp))) for logp in now]
    outputs, expected = train(whole, minibatch)
    assert outputs["tokens"].count == minibatch.tokens == 37
    assert {"weight/fresh_p50", "weight/replayed_p50", "weight/ess_age_1"} < shown(outputs).keys()
    assert outputs["stepped"] and max(float(gradient.abs().max()) for gradient in expected.values()) > 0.05
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert outputs["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    for budget, shared, parts in ((1, True, 8), (20, False, 5), (20, True, 3)):
        settings: dict[str, Any] = {"micro_batch_tokens": budget, "shared_prompts": shared}
        module = policy(folder, **slots(objective), **settings)
        assert len(module._passes(minibatch, minibatch.rows())) == parts
        split_outputs, found = train(module, minibatch)
        assert split_outputs["mean_loss"] == pytest.approx(outputs["mean_loss"], abs=1e-6)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert shown(split_outputs) == pytest.approx(shown(outputs), abs=2e-6, rel=1e-5)


def test_first_step_is_the_policy_gradient(folder: Path, minibatch: Minibatch) -> None:
    """Without recorded prox the ratio is 1, so the loss is -sum(w A) / tokens and its gradient -sum(w A grad logp)."""
    module = policy(folder)
    outputs, found = train(module, minibatch)
    assert shown(outputs)["policy/ratio_mean"] == shown(outputs)["policy/ratio_max"] == 1.0
    advantages = [-1.0, 0.0, 1.0, -(2**-0.5), 2**-0.5, -1.0, 0.0, 1.0]  # (score - mean) / std
    pairs = zip(module.logprobs(minibatch), minibatch.rows(), strict=True)
    gap = torch.cat([logp - row.response.behave_logp for logp, row in pairs if row.fresh]).abs()
    assert shown(outputs)["engine/logp_gap_mean"] == pytest.approx(float(gap.mean()), abs=2e-6)
    assert shown(outputs)["engine/logp_gap_max"] == pytest.approx(float(gap.max()), abs=2e-6)
    module.zero_grad()
    loss = torch.zeros(())
    rows = minibatch.rows(advantages=list(torch.tensor(advantages)))
    for r, (logp, _) in zip(rows, plain(module, minibatch), strict=True):
        weight = 1.0 if r.fresh else (logp.detach() - r.response.behave_logp).exp().clamp(max=5)
        loss = loss - (weight * r.tensors["advantages"] * logp).sum() / 37
    loss.backward()
    expected = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_empty_minibatch_takes_no_step(folder: Path) -> None:
    outputs, gradients = train(policy(folder), Minibatch([], 0, 0))
    assert outputs["stepped"] is False and outputs["tokens"].count == 0 and gradients == {}


def test_bad_policy_settings_are_named(folder: Path) -> None:
    for settings, named in (
        ({"micro_batch_tokens": 0}, "model.micro_batch_tokens is 0"),
        ({"max_grad_norm": 0.0}, "model.max_grad_norm is 0"),
        ({"dtype": "int8"}, "model.dtype is 'int8'"),
        ({"path": None}, "model.path"),
    ):
        with pytest.raises(SettingError, match=named):
            PolicyModule(**{"path": str(folder)} | settings)
    with pytest.raises(SettingError, match="/no/model"):
        attached(PolicyModule(path="/no/model"))


def test_mixed_precision_keeps_the_weights_and_the_ratio(policy: Path, tmp_path: Path) -> None:
    """At learning rate 0 the ratio is exactly 1, because proximal log-probs use the precision of the step."""
    still = fit(policy, tmp_path / "still", precision="bf16-mixed", lr=0.0, iterations=2)
    for row in still.rows:
        assert (row["policy/ratio_mean"], row["policy/ratio_max"], row["policy/clip_frac"]) == (1, 1, 0)
        assert 1e-5 < row["engine/logp_gap_mean"] < 0.03  # the engine also computes in bfloat16
    assert {parameter.dtype for parameter in still.module.parameters()} == {torch.float32}
    before = weights_of(still.module)
    moved = fit(policy, tmp_path / "moved", precision="bf16-mixed", lr=1e-6, iterations=1).weights
    # Such a step would be lost in a bfloat16 weight.
    assert all(not torch.equal(moved[name], weight) for name, weight in before.items())
    assert not any(torch.equal(moved[name].bfloat16(), moved[name]) for name in moved)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_the_engine_does_not_follow_are_refused(folder: Path, precision: str) -> None:
    with pytest.raises(SettingError, match=f"trainer.precision is '{precision}'"):
        attached(PolicyModule(path=str(folder)), precision)


def test_a_reward_that_nobody_gives_is_named(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"model\.reward_key is 'accuracy'.* acc, format, score"):
        fit(policy, tmp_path, model={"reward_key": "accuracy"}, iterations=1)


def test_more_tokens_than_the_model_has_positions_are_named(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"more than the 256 positions of model\.path"):
        fit(policy, tmp_path, max_new_tokens=250, iterations=1)
