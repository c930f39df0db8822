"""For the tower of each Qwen-VL, a rank without an image reaches all trained parameters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import REPOSITORY

from popo_lightning.model.loading import load_trainable, vision_tower, zero_through_vision_tower

sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_families import make


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_unseen_image_is_zero_and_has_been_through_all_of_the_tower(kind: str, tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter, including those of Qwen3-VL's inner features."""
    model = load_trainable(make(kind, tmp_path), torch.float32, freeze_vision=False)
    zero = zero_through_vision_tower(model, torch.device("cpu"), torch.float32)
    zero.backward()
    tower = vision_tower(model)
    assert tower is not None and float(zero) == 0
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)
