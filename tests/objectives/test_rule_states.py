"""What a rule of the objective keeps between steps is saved, given back, and missed when it is forgotten."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import method, metrics, popo, weights_of
from torch import Tensor

from popo_lightning.objectives.advantages import GroupNormalized
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import EntropyBonus, Regularizer
from popo_lightning.objectives.rule_states import RuleStates


class Forgets(EntropyBonus):
    """Raises its coefficient with every pass that trains."""

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        self.coefficient = min(1.0, 2 * self.coefficient)
        return super().__call__(rows, weight)


class Keeps(Forgets):
    state = ("coefficient",)


def states(*regularizers: Regularizer) -> RuleStates:
    return RuleStates(GroupNormalized(), Objective(regularizers=list(regularizers)))


def used(rule: EntropyBonus) -> None:
    zeros = torch.zeros(1, 2)
    ones = torch.ones(1, 2, dtype=torch.bool)
    rule(ObjectiveInputs(zeros, zeros, zeros, zeros[:, :1], ones, ones[:, 0], entropy=zeros), zeros)


def test_state_comes_back_to_the_same_slot_and_class() -> None:
    rule = Keeps(0.1)
    kept = states(EntropyBonus(0.5), rule)
    used(rule)
    saved = kept.state_dict()
    assert list(saved) == ["model.regularizers[1]"], "a rule without state takes no room"
    again, forgets, plain = Keeps(0.1), Forgets(0.1), Keeps(0.1)
    states(EntropyBonus(0.5), again).load_state_dict(saved)
    states(EntropyBonus(0.5), forgets).load_state_dict(saved)
    states(plain).load_state_dict(saved)
    assert (again.coefficient, forgets.coefficient, plain.coefficient) == (0.2, 0.1, 0.1)


def test_what_is_forgotten_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rules = Forgets(0.1), Keeps(0.1)
    kept = states(*rules)
    with caplog.at_level(logging.WARNING):
        kept.state_dict()
        assert not caplog.records
        for rule in rules:
            used(rule)
        kept.state_dict()
        kept.state_dict()
    (record,) = caplog.records
    assert record.getMessage().startswith("model.regularizers[0] Forgets changes 'coefficient'")


def test_a_resumed_run_continues_with_the_state(config: Path, tmp_path: Path) -> None:
    quick = ["--evaluation.at_start", "false", "--evaluation.every_n_iterations", "0", "--evaluation.samples", "0"]
    slots = ["--model.regularizers", f"[{{class_path: {__name__}.Keeps, init_args: {{coefficient: 1.0e-4}}}}]"]
    command = ["fit", "--config", config, *method("grpo"), *quick, *slots, "--checkpoint.every_n_epochs", "1"]
    whole = popo(*command, "--trainer.max_epochs", "3", "--run.folder", tmp_path / "whole")
    popo(*command, "--trainer.max_epochs", "2", "--run.folder", tmp_path / "stopped")
    again = popo(*command, "--trainer.max_epochs", "3", "--run.folder", tmp_path / "stopped", "--run.resume", "true")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    left, right = (weights_of(cli.model) for cli in (again, whole))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)
