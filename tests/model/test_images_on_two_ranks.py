"""FSDP2 trains on images as one process does, if ranks have unequal passes, with images, without, or none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import asked, minibatch_groups, picture
from helpers.processes import on_two_ranks, train, whole_tensors
from helpers.tiny_models import random_vision_model

from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.remix import ConvexKL
from popo_lightning.model.critic import Critic
from popo_lightning.model.loading import load_model
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.policy import PolicyModule


def groups_of(folder: Path) -> list[Group]:
    """Returns four groups with an image and one without."""
    pictures = [picture(*size, seed) for seed, size in enumerate([(84, 56), (28, 56), (56, 56), (28, 28)])]
    problems = [asked(f"seen {i}", f"<image>{i}+2", image) for i, image in enumerate(pictures)]
    return minibatch_groups(folder, [*problems, asked("text", "3*4")])


def minibatches(folder: Path) -> list[tuple[Minibatch, Minibatch]]:
    """Returns both ranks' minibatches of each step."""
    *seen, text = groups_of(folder)
    steps = [(seen[:3], seen[3:]), ([text], seen[:2]), (seen[1:3], [text, text]), ([], [seen[0]])]
    return [(Minibatch(a, 0, index), Minibatch(b, 0, index)) for index, (a, b) in enumerate(steps)]


def trained(folder: Path, strategy: str, gradient_sync: str = "step") -> dict[str, Any]:
    """Returns the weights after the steps, with a critic and a reference, and the log-probs and values of a step."""
    torch.manual_seed(0)
    module = PolicyModule(
        path=str(folder),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        micro_batch_tokens=12,
        gradient_sync=gradient_sync,
        critic=Critic(lr=0.1),
        advantage=GAE(whiten=False),
        regularizers=[ConvexKL(0.5)],
    )
    steps = minibatches(folder)
    together = [(Minibatch(a.groups + b.groups, 0, a.index),) for a, b in steps]
    module, trainer = train(module, strategy, together if strategy == "one" else steps)
    own = (together if strategy == "one" else steps)[0][trainer.global_rank]
    scores = {"logprobs": torch.stack(module.logprobs(own)), "values": torch.stack(module.estimates(own)["values"])}
    return scores | {"weights": whole_tensors(module.named_parameters())}


def trained_each_way(folder: Path) -> list[dict[str, Any]]:
    return [trained(folder, "fsdp2", way) for way in ("step", "micro_batch")]


@pytest.mark.slow
def test_sharded_ranks_train_on_images_as_one_process_does(tmp_path: Path) -> None:
    folder = random_vision_model(tmp_path / "model")
    alone = trained(folder, "one")
    first, second = on_two_ranks(trained_each_way, tmp_path / "ranks", folder, seconds=240)
    for one, other in zip(first, second, strict=True):
        for rank in (one, other):
            torch.testing.assert_close(rank["weights"], alone["weights"], atol=2e-5, rtol=0)
        for name in ("logprobs", "values"):
            torch.testing.assert_close(torch.cat([one[name], other[name]]), alone[name], atol=1e-4, rtol=0)
    before = load_model(folder, torch.float32).state_dict()
    for name in ("visual.patch_embed.proj.weight", "visual.blocks.1.attn.proj.weight", "visual.merger.mlp.2.weight"):
        for prefix in ("model.model.", "value_model.base."):
            moved = float((alone["weights"][prefix + name] - before["model." + name]).abs().max())
            assert moved > 1e-4, (prefix + name, moved)
