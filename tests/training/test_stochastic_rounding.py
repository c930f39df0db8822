"""bfloat16 weights at a small learning rate: plain AdamW loses its updates, the optimizer of configs/card does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.places import REPOSITORY

CONFIG = REPOSITORY / "configs" / "card" / "24gb_1p5b.yaml"
STEPS, LR = 50, 1e-6


def settings() -> tuple[str, dict[str, Any]]:
    optimizer = yaml.safe_load(CONFIG.read_text())["model"]["optimizer"]
    return optimizer["class_path"].rpartition(".")[2], optimizer["init_args"]


def rounding_adamw(parameters: Any) -> torch.optim.Optimizer:
    """Makes the configuration's optimizer."""
    optim = pytest.importorskip("torchao.optim", reason="torchao, an optional dependency, is not installed")
    name, init_args = settings()
    made: torch.optim.Optimizer = getattr(optim, name)(parameters, **init_args | {"weight_decay": 0.0})
    return made


def plain_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)


def moved(make: Callable[[Any], torch.optim.Optimizer]) -> float:
    """Returns the mean movement of 131,072 bfloat16 weights of 0.03, relative to float32 AdamW."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.full((512, 256), 0.03, dtype=torch.bfloat16))
    start = weight.detach().float().clone()
    optimizer = make([weight])
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for minutes on a busy CPU
        for _ in range(STEPS):
            weight.grad = torch.ones_like(weight)  # AdamW then moves every weight by the learning rate
            optimizer.step()
    return float((start - weight.detach().float()).mean()) / (STEPS * LR)


def test_plain_adamw_moves_no_bfloat16_weight() -> None:
    assert moved(plain_adamw) == 0.0


def test_the_preset_moves_them_as_far_as_in_float32() -> None:
    assert settings()[1]["lr"] == LR
    # The sum's standard deviation is 2% of it, because 131,072 weights jump by 1.2e-4 with a chance of 0.8% per step.
    assert moved(rounding_adamw) == pytest.approx(1.0, abs=0.1)


@torch.compiler.set_stance("force_eager")
def test_its_state_is_read_without_pickle(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = rounding_adamw([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = rounding_adamw([weight])
    again.load_state_dict(state)
    assert torch.equal(again.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    again.step()
