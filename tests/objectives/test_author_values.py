"""The objectives of configs/method give the values of the methods' own code."""

from __future__ import annotations

import inspect

import pytest
import torch
import yaml
from helpers.objectives import loss_and_gradient
from helpers.places import REPOSITORY
from jsonargparse import ArgumentParser

from popo_lightning.cli.class_names import import_classes
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective


def objective(method: str) -> Objective:
    settings = yaml.safe_load((REPOSITORY / "configs" / "method" / f"{method}.yaml").read_text())
    import_classes()
    parser = ArgumentParser()
    parser.add_class_arguments(Objective, "objective")
    slots = {
        name: settings["model"][name] for name in inspect.signature(Objective).parameters if name in settings["model"]
    }
    found = parser.instantiate_classes(parser.parse_object({"objective": slots})).objective
    assert isinstance(found, Objective)
    return found


def token(policy: float, prox: float, behave: float, advantage: float) -> ObjectiveInputs:
    """Returns one replayed token with these log-probs."""
    logps = [torch.tensor([[logp]], dtype=torch.float64) for logp in (policy, prox, behave)]
    logps[0].requires_grad_()
    one = torch.tensor([[advantage]], dtype=torch.float64)
    return ObjectiveInputs(*logps, one, torch.tensor([[True]]), torch.tensor([False]))


LOG = {ratio: float(torch.tensor(ratio, dtype=torch.float64).log()) for ratio in (1.1, 1.5, 2.0, 2.9, 3.1, 5.0)}


@pytest.mark.parametrize(
    ("method", "rows", "loss", "gradient"),
    [
        # FreshPER's ratio is policy / behave, e^0.6 = 1.822, held at 1.2. A decoupled weight would make it 1.822.
        ("freshper", token(-0.4, -0.4, -1.0, 1.0), -1.2, 0.0),
        ("freshper", token(-0.4, -0.4, -0.4 - LOG[2.9], -1.0), 2.9, 2.9),
        ("freshper", token(-0.4, -0.4, -0.4 - LOG[3.1], -1.0), 0.0, 0.0),  # FreshPER's filter, at 3
        # ARPO's dual clip is 3. Without it the loss would be 5.
        ("arpo", token(-0.4, -0.4 - LOG[5.0], -1.0, -1.0), 3.0, 0.0),
        # BAPO's clip is around 1 for any prox / behave: w = 2, r = 1.1 is free, and 1.5 is held at 1.28.
        ("bapo_buffer", token(-1.0, -1.0 - LOG[1.1], -1.0 - LOG[1.1] - LOG[2.0], 1.0), -2.2, -2.2),
        ("bapo_buffer", token(-1.0, -1.0 - LOG[1.5], -1.0 - LOG[1.5] - LOG[2.0], 1.0), -2.56, 0.0),
    ],
)
def test_loss_and_gradient_are_those_of_the_authors(
    method: str, rows: ObjectiveInputs, loss: float, gradient: float
) -> None:
    found, slope = loss_and_gradient(objective(method), rows)
    assert float(found) == pytest.approx(loss)
    assert float(slope) == pytest.approx(gradient)
