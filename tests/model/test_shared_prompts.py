"""A prompt computed once for several responses gives the same numbers, gradients and training as several prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import Run, attached, fit, random_model, random_vision_model, slots, weights_of
from torch import Tensor

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model import packing
from popo_lightning.model.attention import PACKED
from popo_lightning.model.critic import Critic
from popo_lightning.model.padded_rows import PaddedRows, pad_sequences
from popo_lightning.model.scoring import response_states
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import EntropyBonus
from popo_lightning.policy import PolicyModule

TOKENS = 15  # the vocabulary of the tiny models is larger
# prompt tokens, response tokens: some have one token, none, no other response, or the same length
GROUPS = ((6, (3, 1, 8, 8)), (9, (5, 0, 2)), (2, (1, 1)), (12, (7,)), (4, (0, 0)))


@pytest.fixture(scope="module", params=["qwen2", "llama-untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def minibatch() -> Minibatch:
    """Returns fresh and stored groups. One shares its prompt with a fresh group, and one has a group loss weight."""
    draw = torch.Generator().manual_seed(1)

    def drawn(length: int) -> Tensor:
        return torch.randint(1, TOKENS, (length,), generator=draw)

    groups = []
    for id, (prompt, lengths) in enumerate(GROUPS):
        answers = [
            Response(drawn(n), -3 * torch.rand(n, generator=draw), "stop", "", {"score": float(i), "acc": 0.0})
            for i, n in enumerate(lengths)
        ]
        groups.append(Group(id, group(id).problem, drawn(prompt), answers, version=4 - id % 2, loss_weight=1 + id / 9))
    groups.append(replace(groups[0], id=9, version=1, responses=groups[0].responses[2:] * 2))
    return Minibatch(groups, version=4, index=0)


def policy(folder: Path, shared: bool, **settings: Any) -> PolicyModule:
    objective = Objective(regularizers=[EntropyBonus(0.3)])
    return attached(PolicyModule(path=str(folder), **slots(objective), shared_prompts=shared, **settings))


def packed(module: PolicyModule, minibatch: Minibatch) -> list[bool]:
    """Returns for each pass whether it shares prompts."""
    return [part.segments is not None for part in module._passes(minibatch, minibatch.rows())]


def by_row(module: PolicyModule, minibatch: Minibatch) -> list[tuple[Tensor, Tensor]]:
    """Returns (log-probs, entropies) of each row, with gradient."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module._passes(minibatch, minibatch.rows()):
        for index, logp, entropy, mask in zip(part.index.tolist(), *module(part), part.mask, strict=True):
            found[index] = logp[mask], entropy[mask]
    return [found[index] for index in range(len(found))]


def gradients(module: PolicyModule, minibatch: Minibatch) -> dict[str, Tensor]:
    module.zero_grad()
    loss = torch.zeros(())
    for index, (logp, entropy) in enumerate(by_row(module, minibatch)):
        loss = loss + (torch.sin(torch.arange(len(logp)) + index) * logp).sum() + 0.2 * entropy.sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-4, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


# -- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
@pytest.mark.parametrize("budget", [16384, 60])
def test_log_probs_entropies_and_gradients_are_the_plain_ones(
    folder: Path, minibatch: Minibatch, attention: str, budget: int
) -> None:
    shared, plain = (policy(folder, each, micro_batch_tokens=budget) for each in (True, False))
    shared.model.set_attn_implementation(attention)
    plain.model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    assert any(packed(shared, minibatch)) and not any(packed(plain, minibatch))
    tokens = [
        sum(int(part.attention_mask.sum()) for part in each._passes(minibatch, minibatch.rows()))
        for each in (shared, plain)
    ]
    assert tokens[0] < 0.8 * tokens[1]
    for (logp, entropy), (expected_logp, expected_entropy) in zip(
        by_row(shared, minibatch), by_row(plain, minibatch), strict=True
    ):
        torch.testing.assert_close(logp, expected_logp, atol=2e-5, rtol=0)
        torch.testing.assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)
    assert torch.cat([logp for logp, _ in by_row(plain, minibatch)]).std() > 1
    assert_close_gradients(gradients(shared, minibatch), gradients(plain, minibatch))


def test_log_probs_come_in_row_order(folder: Path, minibatch: Minibatch) -> None:
    expected = policy(folder, False).logprobs(minibatch)
    for budget in (1, 40, 10_000):
        found = policy(folder, True, micro_batch_tokens=budget).logprobs(minibatch)
        assert [len(logp) for logp in found] == [len(r.token_ids) for r in minibatch.responses]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(folder: Path, minibatch: Minibatch) -> None:
    module = policy(folder, True, gradient_checkpointing=True)
    assert packed(module, minibatch)[0] and module.model.training
    assert_close_gradients(gradients(module, minibatch), gradients(policy(folder, False), minibatch))


def test_values_of_a_critic_are_the_plain_ones(folder: Path, minibatch: Minibatch) -> None:
    modules = [policy(folder, each, critic=Critic(), advantage=GAE()) for each in (True, False)]
    for module in modules:
        torch.nn.init.normal_(module.value_model.head.weight, generator=torch.Generator().manual_seed(0))
    shared, plain = (module.estimates(minibatch)["values"] for module in modules)
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-5)
    assert torch.cat(plain).std() > 1


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
def test_mixed_precision_rounds_no_more_than_it_does_apart(folder: Path, minibatch: Minibatch, attention: str) -> None:
    exact = torch.cat(policy(folder, False).logprobs(minibatch))
    errors = []
    for shared in (True, False):
        module = attached(PolicyModule(path=str(folder), shared_prompts=shared), "bf16-mixed")
        module.model.set_attn_implementation(attention if shared or attention != PACKED else "sdpa")
        errors.append(float((torch.cat(module.logprobs(minibatch)) - exact).abs().mean()))
    assert 0 < errors[0] < 2 * errors[1] < 0.5


def test_a_response_depends_on_no_other_and_sends_no_gradient_to_one(folder: Path) -> None:
    module = policy(folder, True)
    prompt, draw = torch.arange(1, 7), torch.Generator().manual_seed(3)
    answers = [Response(torch.randint(7, 10, (4,), generator=draw), torch.zeros(4), "stop") for _ in range(3)]
    answers[1] = replace(answers[1], token_ids=torch.tensor([10, 11, 10, 12]))  # tokens that no other response has
    rows = Minibatch([Group(0, group(0).problem, prompt, answers, 0)], 0, 0).rows()
    part = pad_sequences([rows])
    before, _ = module(part)
    other = replace(part, input_ids=part.input_ids.clone())
    other.input_ids[0, 10:14] = torch.tensor([3, 9, 13, 2])  # the second response
    after, _ = module(other)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 0.1
    embeddings = module.model.get_input_embeddings().weight
    for row, foreign in ((0, {10, 11, 12}), (2, {10, 11, 12})):
        (states,) = torch.autograd.grad(_states(module, part)[4 * row : 4 * row + 4].square().sum(), embeddings)
        assert not states[list(foreign)].any() and states[1:7].abs().sum(-1).min() > 0
    (states,) = torch.autograd.grad(_states(module, part)[4:8].square().sum(), embeddings)
    assert states[[10, 11]].abs().sum(-1).min() > 0


def _states(module: PolicyModule, part: PaddedRows) -> Tensor:
    return response_states(module.model.base_model, part)


# -- where it is not exact -----------------------------------------------------------------------------------------


def test_a_sliding_window_takes_the_plain_path(tmp_path: Path, minibatch: Minibatch) -> None:
    """The packed path would be wrong, since tokens just before a response in its sequence would count as near."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = Qwen2Config(
        vocab_size=20, hidden_size=32, intermediate_size=48, initializer_range=0.3, **settings, **window
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    module = policy(tmp_path, True)
    assert not any(packed(module, minibatch))
    plain = module.logprobs(minibatch)
    torch.testing.assert_close(plain, policy(tmp_path, False).logprobs(minibatch))
    part = pad_sequences([minibatch.rows()[:4]])
    logp, _ = module(part)
    assert (logp[3] - plain[3]).abs().max() > 1e-3


def test_images_take_the_plain_path(tmp_path: Path, minibatch: Minibatch) -> None:
    assert not any(packed(policy(random_vision_model(tmp_path), True), minibatch))


def test_it_can_be_switched_off_and_costs_decide(
    folder: Path, minibatch: Minibatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = minibatch.groups[0]
    one = Minibatch([replace(first, prompt_ids=first.prompt_ids[:3], responses=first.responses[2:])], 4, 0)
    assert packed(policy(folder, True), one) == [True] and packed(policy(folder, False), one) == [False]
    monkeypatch.setitem(packing.PAIR_WEIGHTS, "cpu", packing.PairWeights(1.0, 1e6))
    assert packed(policy(folder, True), one) == [True]  # blocks that the mask hides are not computed
    assert packed(policy(folder, True, attention="sdpa"), one) == [False]


# -- the same training ---------------------------------------------------------------------------------------------


def trained(policy: Path, folder: Path, shared: bool, **settings: Any) -> Run:
    model = {"shared_prompts": shared, **settings.pop("model", {})}
    common: dict[str, Any] = {"lr": 0.1, "optimizer": torch.optim.SGD, "minibatches": 1}
    return fit(policy, folder, model=model, **common | settings)


def test_a_step_is_the_same_step(policy: Path, tmp_path: Path) -> None:
    """Uses plain gradient descent. Adam's first step is the gradient's sign, even if that is a rounding error."""
    shared, plain = (trained(policy, tmp_path / str(each), each, iterations=1) for each in (True, False))
    for name, weight in weights_of(plain.module).items():
        torch.testing.assert_close(shared.module.get_parameter(name), weight, atol=1e-6, rtol=1e-5)
    assert max(row["train/grad_norm"] for row in plain.rows) > 1e-2


@pytest.mark.slow
def test_a_training_with_replay_and_a_critic_is_the_same(policy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iterations": 3, "minibatches": 2, "lr": 0.02}
    for name, model in (("popo", {}), ("critic", {"critic": Critic(lr=0.02), "advantage": GAE()})):
        shared, plain = (
            trained(policy, tmp_path / name / str(each), each, model=model, **settings) for each in (True, False)
        )
        assert sum(row["replay/groups"] for row in plain.rows) > 0
        for mine, other in zip(shared.rows, plain.rows, strict=True):
            assert mine["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
            assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
            assert mine["policy/ratio_max"] == pytest.approx(other["policy/ratio_max"], rel=1e-4)
        for parameter, weight in weights_of(plain.module).items():
            torch.testing.assert_close(shared.module.get_parameter(parameter), weight, atol=1e-5, rtol=1e-4)
