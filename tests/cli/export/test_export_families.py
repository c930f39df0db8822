"""Families whose parameter names differ from those in their folders are exported under the names of their folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.exports import exported, same_bits, tensors
from helpers.tiny_models import REPOSITORY, attached

from popo_lightning.policy import PolicyModule

sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_families import make

# Experts packed in several ways, changed names, routers with a bias in a buffer, fused projections, and none of these.
KINDS = ("qwen3_moe", "mixtral", "phimoe", "granitemoe", "deepseek_v3", "jamba", "gpt_oss", "minimax_m2", "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_exported_as_it_was_found(kind: str, tmp_path: Path) -> None:
    """An engine gets the same bits. tests/model/test_saved_weights.py compares them with the folder's."""
    base = make(kind, tmp_path / "base")
    policy = attached(PolicyModule(path=str(base)))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1)
    torch.save({"pytorch-lightning_version": "2", "state_dict": policy.state_dict()}, tmp_path / "a.ckpt")
    exported(tmp_path / "a.ckpt", tmp_path / "out", "--base", base)
    found, began = tensors(tmp_path / "out"), tensors(base)
    sent = dict(policy.as_saved(policy.named_weights()))
    assert found.keys() == began.keys() and not any(same_bits(found[name], began[name]) for name in list(began)[:1])
    assert all(same_bits(tensor, sent[name]) for name, tensor in found.items())
    loaded = PolicyModule.load_from_checkpoint(tmp_path / "a.ckpt", path=str(base))
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [module.model(ids, use_cache=False).logits for module in (loaded, policy)]
    assert torch.equal(*logits)
