"""The value model: the places of its values, its loss, and its learning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import Run, fit, random_model, random_vision_model, weights_of
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row
from popo_lightning.methods.max_at_k import MaxAtK
from popo_lightning.model.critic import Critic, ValueModel, check_critic
from popo_lightning.model.loading import blank_image, image_tokens, load_trainable
from popo_lightning.model.padded_rows import PaddedRows, pad_rows
from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.proximal.critic_values import CriticValues
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.training.gradients import clip_gradients


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_trainable(random_model("llama-untied", tmp_path_factory.mktemp("model")), torch.float32, False).eval()


def row(index: int, prompt: int, length: int, images: dict[str, Tensor] | None = None, mark: int = 0) -> Row:
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(3, 20, (prompt + length,), generator=generator)
    if images:
        tokens[1] = mark
    response = Response(tokens[prompt:], torch.zeros(length), "stop")
    return Row(index, tokens[:prompt], response, images=images or {})


def uneven() -> PaddedRows:
    return pad_rows([row(0, 3, 5), row(1, 6, 1), row(2, 1, 4)])


def with_a_head(model: Any) -> ValueModel:
    """Returns a value model whose values differ from place to place."""
    value_model = ValueModel(model, Critic())
    with torch.no_grad():
        value_model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        value_model.head.bias.fill_(0.3)
    return value_model


def test_the_first_values_are_zero(model: Any) -> None:
    values = ValueModel(model, Critic())(uneven())
    assert values.shape == (3, 5) and values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(3, 5))


def test_a_value_is_of_the_state_before_its_token(model: Any) -> None:
    """Compares row by row without padding: token t of the response is chosen at the position before it."""
    value_model, rows = with_a_head(model), uneven()
    values = value_model(rows)
    for index, (prompt, length) in enumerate(((3, 5), (6, 1), (1, 4))):
        ids = rows.input_ids[index : index + 1, : prompt + length]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        for t in range(length):
            expected = hidden[prompt + t - 1] @ value_model.head.weight[0] + 0.3
            torch.testing.assert_close(values[index, t], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(values[index, length:], torch.zeros(5 - length))


def test_a_value_does_not_see_its_own_token(model: Any) -> None:
    value_model, rows = with_a_head(model), uneven()
    before = value_model(rows)
    rows.input_ids[0, 3 + 2] += 1  # the third token of the first response
    after = value_model(rows)
    torch.testing.assert_close(after[0, :3], before[0, :3])
    assert (after[0, 3:] - before[0, 3:]).abs().min() > 1e-3


def test_it_is_a_copy_that_leaves_the_policy_alone(model: Any) -> None:
    value_model = with_a_head(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in own for parameter in value_model.parameters())
    value_model(uneven()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in value_model.parameters())


def test_mixed_precision_keeps_the_head_exact(model: Any) -> None:
    value_model, rows = with_a_head(model), uneven()
    exact = value_model(rows)
    with torch.autocast("cpu", torch.bfloat16):
        values = value_model(rows)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())  # the head sums in float32, not bfloat16
    torch.testing.assert_close(values, exact, rtol=0.1, atol=0.3)
    assert ValueModel(copy.deepcopy(model).bfloat16(), Critic()).head.weight.dtype == torch.float32


def test_images_are_seen_and_a_frozen_tower_stays_frozen(tmp_path: Path) -> None:
    model = load_trainable(random_vision_model(tmp_path), torch.float32, True).eval()
    value_model, mark = with_a_head(model), image_tokens(model.config)
    assert model.config.image_token_id in mark
    images = blank_image(model.config, torch.device("cpu"), torch.float32)
    bright = images | {"pixel_values": images["pixel_values"] + 1}
    rows = [pad_rows([row(0, 4, 3, each, model.config.image_token_id)]) for each in (images, bright)]
    dark_values, bright_values = (value_model(each) for each in rows)
    assert (dark_values - bright_values).abs().min() > 1e-4
    value_model(rows[0]).sum().backward()
    trained = {name for name, parameter in value_model.named_parameters() if parameter.grad is not None}
    assert "head.weight" in trained and not any("visual" in name for name in trained)


def test_value_loss_by_hand() -> None:
    # c = 0.5. Token 1: V 2, old 1, return 1: (2-1)^2 = 1 against (1.5-1)^2: 1. Token 2: V 2, old 1, return 3: (2-3)^2 =
    # 1 against (1.5-3)^2 = 2.25: 2.25. Token 3: V 0, old 0.1, return 1: 1 both. The sum 4.25 is halved and divided by
    # 10.
    values = torch.tensor([[2.0, 2.0], [0.0, float("nan")]])
    old, returns = torch.tensor([[1.0, 1.0], [0.1, 5.0]]), torch.tensor([[1.0, 3.0], [1.0, float("inf")]])
    mask = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(Critic().loss(values, old, returns, mask, 10.0), torch.tensor(0.2125))
    # Without the bound it is 1 + 1 + 1.
    torch.testing.assert_close(Critic(value_clip=None).loss(values, old, returns, mask, 10.0), torch.tensor(0.15))


def test_a_value_that_moved_too_far_gets_no_gradient() -> None:
    old, returns, mask = torch.zeros(1, 4), torch.tensor([[2.0, -2.0, 0.2, -2.0]]), torch.ones(1, 4).bool()
    # Above the bound towards the return, away from it, inside, and below it. The gradients are 0, V - return, V -
    # return, 0.
    values = torch.tensor([[1.0, 1.0, 0.1, -1.0]], requires_grad=True)
    Critic().loss(values, old, returns, mask, 1.0).backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 3.0, -0.1, 0.0]]))


def test_padding_sends_no_gradient() -> None:
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    Critic().loss(values, torch.zeros(1, 2), torch.zeros(1, 2), mask, 1.0).backward()
    torch.testing.assert_close(values.grad, torch.tensor([[1.0, 0.0]]))


@pytest.mark.slow
def test_it_learns_what_the_states_are_worth(model: Any) -> None:
    """The first token of the response determines the return: it is known after that token and random before it."""
    rows = pad_rows([row(index, 2, 4) for index in range(16)])
    rows.input_ids[:, :2] = 5
    returns = (rows.input_ids[:, 2] % 2).float()[:, None].expand(-1, 4)
    critic = Critic()
    value_model = ValueModel(model, critic)
    optimizer = torch.optim.Adam(value_model.parameters(), lr=1e-3)
    for _ in range(150):
        old = value_model(rows).detach()
        optimizer.zero_grad()
        critic.loss(value_model(rows), old, returns, rows.mask, rows.mask.sum().item()).backward()
        clip_gradients(value_model, critic.max_grad_norm)
        optimizer.step()
    values = value_model(rows).detach()
    torch.testing.assert_close(values[:, 0], returns.mean().expand(16), rtol=0, atol=0.1)
    assert (values - returns)[:, 1:].abs().mean() < 0.05


def test_gradients_are_clipped_to_its_own_norm() -> None:
    module = nn.Linear(2, 1, bias=False)
    for limit, expected in ((1.0, [0.6, 0.8]), (None, [3.0, 4.0]), (10.0, [3.0, 4.0])):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(module, limit) == pytest.approx(5)
        torch.testing.assert_close(module.weight.grad, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


class Norms(L.Callback):
    """Records the gradients' norms of critic and policy as the optimizer gets them."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parts = (pl_module.value_model, pl_module.model)
        gradients = [[p.grad.norm() for p in part.parameters() if p.grad is not None] for part in parts]
        self.seen.append([torch.stack(norms).norm().item() for norms in gradients])


def test_a_run_clips_the_critic_and_the_policy_each_to_its_own_norm(policy: Path, tmp_path: Path) -> None:
    norms = Norms()
    ppo(policy, tmp_path, Critic(max_grad_norm=1e-3), GAE(), iterations=1, max_grad_norm=1e-4, callbacks=[norms])
    assert norms.seen and all(seen == pytest.approx([1e-3, 1e-4], rel=1e-2) for seen in norms.seen)


def test_a_critic_and_its_advantage_come_together() -> None:
    check_critic(Critic(), GAE())
    check_critic(None, GroupNormalized())
    with pytest.raises(SettingError, match=r"GAE, which needs .*model\.critic is null; set it to"):
        check_critic(None, GAE())
    with pytest.raises(SettingError, match=r"model\.critic is set but .*GroupNormalized.*leave the critic out"):
        check_critic(Critic(), GroupNormalized())


@pytest.mark.parametrize("settings", [{"lr": -1e-5}, {"value_clip": 0.0}, {"max_grad_norm": -1.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"^Critic\.\w+ is "):
        Critic(**settings)


def ppo(policy: Path, folder: Path, critic: Critic, advantage: GAE, **settings: Any) -> Run:
    return fit(policy, folder, composer=OnPolicy(), model={"advantage": advantage, "critic": critic}, **settings)


def test_a_critic_that_does_not_learn_leaves_the_rewards(policy: Path, tmp_path: Path) -> None:
    """With values of 0 and no whitening the policy moves as with the reward as advantage, which is MaxAtK(1)'s."""
    frozen = ppo(policy, tmp_path / "ppo", Critic(lr=0.0), GAE(whiten=False), iterations=2)
    plain = fit(policy, tmp_path / "plain", composer=OnPolicy(), model={"advantage": MaxAtK(1)}, iterations=2)
    for name, weight in weights_of(plain.module.model).items():
        torch.testing.assert_close(weight, frozen.module.model.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert torch.equal(frozen.module.value_model.head.weight, torch.zeros(1, 64))
    start = load_trainable(policy, torch.float32, False)
    assert any((weights_of(start)[name] != weight).any() for name, weight in weights_of(plain.module.model).items())


def test_a_training_learns_values_and_policy_in_one_step(policy: Path, tmp_path: Path) -> None:
    run = ppo(policy, tmp_path, Critic(lr=2e-3), GAE(), iterations=4, lr=1e-3)
    first, second = run.trainer.optimizers[0].param_groups
    assert (len(run.trainer.optimizers), first["lr"], second["lr"]) == (1, 1e-3, 2e-3)
    assert run.trainer.global_step == 4 * 2
    head = run.module.value_model.head
    assert head.weight.abs().max() > 0
    own = {id(parameter) for parameter in run.module.value_model.parameters()}
    assert {id(parameter) for parameter in second["params"]} == own
    assert not own & {id(parameter) for parameter in first["params"]}
    sent = {name for name, _ in run.module.named_weights()}  # the engine gets no weights of the critic
    assert sent and sent <= {name for name, _ in run.module.model.named_parameters()}


def test_replayed_groups_get_values_too(policy: Path, tmp_path: Path) -> None:
    model = {"advantage": GAE(), "critic": Critic(lr=1e-3)}
    run = fit(policy, tmp_path, model=model, iterations=4)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


class Values(L.Callback):
    """Records the recorded values of each minibatch at the start of its step, and the critic's values at that time."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        recorded, now = batch.recorded["values"], pl_module.estimates(batch)["values"]
        self.seen.append((batch.index, torch.cat(recorded), torch.cat(now)))


def test_values_are_those_of_the_start_of_the_iteration(policy: Path, tmp_path: Path) -> None:
    watch = Values()
    model = {"advantage": GAE(), "critic": Critic(lr=1e-2)}
    settings: dict[str, Any] = {"composer": OnPolicy(), "iterations": 3, "ppo_epochs": 2}
    fit(policy, tmp_path, model=model, callbacks=[CriticValues(), watch], **settings)
    assert [index for index, _, _ in watch.seen] == [0, 1, 2, 3] * 3
    assert all(torch.equal(recorded, now) for index, recorded, now in watch.seen if index == 0)
    for before, after in ((watch.seen[i], watch.seen[i + 2]) for i in (0, 1, 4, 5, 8, 9)):  # one epoch apart
        assert torch.equal(before[1], after[1])
    later = [seen for seen in watch.seen if seen[0] > 0]
    assert all((recorded - now).abs().max() > 1e-4 for _, recorded, now in later)  # so the clip has an effect
