"""A shared value plus one for each group of problems: what the groups' parts learn, and when they learn nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import attached, fit, random_model, tiny_task, weights_of
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.model.critic import Critic, ValueModel
from popo_lightning.model.loading import load_trainable
from popo_lightning.model.nested_head import NestedHead, chosen, problem_groups
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.policy import PolicyModule


class Linear(nn.Module):
    """The heads of a value model on given states."""

    def __init__(self, states: int, groups: int) -> None:
        super().__init__()
        self.head = nn.Linear(states, 1, dtype=torch.float64)
        self.delta = nn.Linear(states, groups, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor, group: Tensor) -> Tensor:
        return self.head(states)[:, 0] + chosen(self.delta(states), group)


def data(shift: float, seed: int = 0, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Returns states, groups and noisy linear returns. The returns of group 0 exceed those of no group by the shift."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    group = torch.arange(rows) % 2 - 1
    noise = 0.1 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return states, group, states @ torch.tensor([0.5, -1.0, 0.25]).double() + shift * (group == 0) + noise


def fitted(states: Tensor, group: Tensor, returns: Tensor, head: NestedHead, steps: int = 400) -> Linear:
    """Fits by full gradient steps on half the mean squared error, with the head's changes of the gradients."""
    model = Linear(states.shape[1], len(head.groups))
    for step in range(steps):
        model.zero_grad()
        (0.5 * (model(states, group) - returns) ** 2).mean().backward()
        head.shape_gradients(model, step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.8 * parameter.grad
    return model


def test_groups_that_differ_by_a_constant_differ_by_it() -> None:
    """Almost without penalty, the group's part is the constant, and the shared part is what both have in common."""
    model = fitted(*data(0.7), NestedHead("level", ["2"], penalty=0.0))
    assert model.delta.bias.item() == pytest.approx(0.7, abs=0.05)
    assert float(model.delta.weight.abs().max()) < 0.05
    torch.testing.assert_close(model.head.weight[0], torch.tensor([0.5, -1.0, 0.25]).double(), rtol=0, atol=0.05)


def test_the_groups_part_is_the_ridge_solution() -> None:
    """The closed form is (X'X / n + penalty on the group's columns) w = X'y / n, for the columns of both parts."""
    states, group, returns = data(0.7)
    model = fitted(states, group, returns, NestedHead("level", ["2"], penalty=0.05))
    ones = torch.cat((states, torch.ones(len(states), 1).double()), 1)
    columns = torch.cat((ones, ones * (group == 0)[:, None]), 1)
    ridge = torch.diag(torch.tensor([0.0] * 4 + [0.05] * 4).double())
    solved = torch.linalg.solve(columns.T @ columns / len(states) + ridge, columns.T @ returns / len(states))
    found = torch.cat([p.detach().flatten() for p in (model.head.weight, model.head.bias)])
    further = torch.cat([p.detach().flatten() for p in (model.delta.weight, model.delta.bias)])
    torch.testing.assert_close(torch.cat((found, further)), solved, rtol=0, atol=1e-6)
    assert 0.4 < float(solved[-1]) < 0.69


@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_that_do_not_differ_get_nothing(shuffled: bool) -> None:
    """For equal groups and random groups the part is 0 within noise, and predicts unseen returns no better."""
    states, group, returns = data(0.7 if shuffled else 0.0)
    if shuffled:
        returns = returns - 0.7 * (group == 0) + 0.7 * (torch.arange(len(group)) % 4 < 2)
    model = fitted(states, group, returns, NestedHead("level", ["2"]))
    assert abs(model.delta.bias.item()) < 0.1 and float(model.delta.weight.abs().max()) < 0.1
    single = fitted(states, torch.full_like(group, -1), returns, NestedHead("level", ["2"]))
    assert not single.delta.weight.any() and not single.delta.bias.any()
    unseen, other, truth = data(0.0, seed=1, rows=2000)
    if shuffled:
        truth = truth + 0.7 * (torch.arange(len(other)) % 4 < 2)
    nested, plain = (float(((each(unseen, other) - truth) ** 2).mean().detach()) for each in (model, single))
    assert nested > plain - 0.002


def test_each_stage_trains_its_own_part() -> None:
    states, group, returns = data(0.7)
    head = NestedHead("level", ["2"], penalty=0.0, shared_iterations=3)
    first, later = (fitted(states, group, returns, head, steps=steps) for steps in (3, 5))
    assert not first.delta.weight.any() and not first.delta.bias.any() and first.head.weight.any()
    assert torch.equal(first.head.weight, later.head.weight) and later.delta.weight.any()
    head = NestedHead("level", ["2"], penalty=0.0, shared_iterations=100)
    second = fitted(states, group, returns, head, steps=400)
    # The shared part has the mean of both groups, so the group's part has half the difference.
    assert second.delta.bias.item() == pytest.approx(0.35, abs=0.06)


def test_an_optimizer_keeps_state_of_all_parts_from_the_first_stage_on() -> None:
    """Otherwise a strategy that splits the optimizer's state could not load it."""
    model, head = Linear(3, 1), NestedHead("level", ["2"], shared_iterations=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    states, group, returns = data(0.7)
    for iteration in range(3):
        optimizer.zero_grad()
        ((model(states, group) - returns) ** 2).mean().backward()
        head.shape_gradients(model, iteration)
        before = model.head.weight.detach().clone()
        optimizer.step()
        assert set(optimizer.state) == set(model.parameters())
        assert bool(model.delta.weight.any()) == (iteration == 2) != bool((model.head.weight != before).any())


def test_a_token_gets_its_groups_part() -> None:
    of_groups = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert chosen(of_groups, torch.tensor([1, -1, 0])).tolist() == [2.0, 0.0, 5.0]


def test_a_value_model_adds_the_part_of_the_rows_group(tmp_path: Path) -> None:
    model = load_trainable(random_model("llama-untied", tmp_path), torch.float32, False).eval()
    head = NestedHead("level", [2, 3])
    nested = ValueModel(model, Critic(head=head))
    first, second = group(0, problem="a"), group(1, problem="b")
    object.__setattr__(second, "problem", Problem("b", "", {}, {"level": 5}))
    minibatch = Minibatch([first, second], 0, 0)
    padded = pad_rows(minibatch.rows(**problem_groups(minibatch, head)))
    assert padded.columns["problem_group"][:, 0].tolist() == [0, 0, -1, -1]
    with torch.no_grad():
        nested.delta.bias += torch.tensor([0.25, 0.5])
    assert nested(padded)[:, 0].tolist() == [0.25, 0.25, 0.0, 0.0]
    assert nested(pad_rows(minibatch.rows()))[:, 0].tolist() == [0.0] * 4  # rows without a requested group
    assert Critic(head=head).first_weights(model).keys() == dict(nested.named_parameters()).keys()


class Levels(type(tiny_task())):  # type: ignore[misc]
    """The tiny task with two kinds of problems."""

    def train_problems(self) -> Any:
        return [
            Problem(each.id, each.prompt, each.answer, {"kind": place % 2})
            for place, each in enumerate(super().train_problems())
        ]


def leveled() -> Any:
    task = tiny_task()
    task.__class__ = Levels
    return task


def trained(policy: Path, folder: Path, head: NestedHead, **settings: Any) -> dict[str, Tensor]:
    model = {"advantage": GAE(), "critic": Critic(lr=1e-2, head=head)}
    return weights_of(fit(policy, folder, model=model, task=leveled(), **settings).module.value_model)


@pytest.mark.slow
def test_a_run_keeps_the_shared_part_in_its_second_stage(policy: Path, tmp_path: Path) -> None:
    head = NestedHead("kind", ["1"], shared_iterations=1)
    first = trained(policy, tmp_path / "first", head, iterations=1)
    second = trained(policy, tmp_path / "second", head, iterations=3)
    assert not first["delta.weight"].any() and first["head.weight"].any() and second["delta.weight"].any()
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("delta."))


def test_the_policy_scores_problems_that_do_not_say_their_group(policy: Path) -> None:
    """`popo estimate` reads logged responses, and no file has the fields of their problems."""
    critic = Critic(head=NestedHead("kind", ["1"]))
    module = attached(PolicyModule(path=str(policy), advantage=GAE(), critic=critic))
    minibatch = Minibatch([group(0)], 0, 0)
    assert len(module.logprobs(minibatch)) == 2
    with pytest.raises(SettingError, match=r"head\.field is 'kind'"):
        module.estimates(minibatch)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NestedHead("level", []), r"NestedHead\.groups is \[\]; name one group"),
        (lambda: NestedHead("level", ["1", 1]), r"each once"),  # type: ignore[list-item]
        (lambda: NestedHead("level", ["1"], penalty=-1.0), r"NestedHead\.penalty is -1"),
        (lambda: NestedHead("level", ["1"], shared_iterations=0), r"NestedHead\.shared_iterations is 0"),
        (lambda: NestedHead("hard", ["1"]).group_of({"level": 2}), r"head\.field is 'hard'.*its fields are level"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make()
