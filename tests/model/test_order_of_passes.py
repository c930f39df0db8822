"""A pass without an image runs a model's layers in the order of a pass with one.

FSDP2 gathers a layer's weights before it runs and sums its gradients after it. Ranks that ran layers in another order
would wait for each other, or take one layer's weights for those of another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import response
from helpers.places import REPOSITORY

from popo_lightning.core.minibatch import Row
from popo_lightning.model.critic import Critic, ValueModel
from popo_lightning.model.loading import blank_image, layers, load_trainable
from popo_lightning.model.padded_rows import PaddedRows, dummy_rows, pad_rows
from popo_lightning.model.scoring import response_logprobs

sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_families import make


def image_row(config: Any) -> PaddedRows:
    """Returns a pass of one row, whose prompt is the smallest image."""
    blank = blank_image(config, torch.device("cpu"), torch.float32)
    prompt = torch.tensor([config.vision_start_token_id, config.image_token_id, config.vision_end_token_id])
    return pad_rows([Row(0, prompt, response(), images=blank)])


def order_of(model: Any, losses: Any, rows: PaddedRows) -> list[str]:
    """Returns the names of a model's layers in the order of their forward and backward passes."""
    names = {module: name for name, module in model.named_modules()}
    seen: list[str] = []
    handles = []
    for layer in layers(getattr(model, "base", model)):
        name = names[layer]
        handles += [
            layer.register_forward_pre_hook(lambda *_, name=name: seen.append(f"forward {name}")),
            layer.register_full_backward_pre_hook(lambda *_, name=name: seen.append(f"backward {name}")),
            layer.register_full_backward_hook(lambda *_, name=name: seen.append(f"after backward {name}")),
        ]
    losses(rows).sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_pass_without_an_image_keeps_the_order(
    kind: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popo_lightning.model.scoring.joined", lambda: True)
    model = load_trainable(make(kind, tmp_path), torch.float32, freeze_vision=False)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    critic = ValueModel(model, Critic())
    for each, scores in ((model, lambda rows: response_logprobs(model, rows, 1.0, [], False)[0]), (critic, critic)):
        seeing, blind = (order_of(each, scores, rows) for rows in (image_row(model.config), dummy_rows()))
        assert seeing == blind
        places = {part: [at for at, step in enumerate(seeing) if part in step] for part in ("visual", "language")}
        assert len(places["visual"]) == len(places["language"]) == 3 * 2 + 2 * checkpointing
        assert places["visual"][0] < places["language"][0] and places["language"][-1] < places["visual"][-1]
