"""An engine gets weights in the form of the checkpoint from which the model was loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.tiny_models import attached, fit
from helpers.vllm import Recorder, llm, started
from safetensors.torch import load_file, save_file
from torch import Tensor

from popo_lightning.engines.base import EngineContext
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.saved_weights import as_saved
from popo_lightning.model.sharded_loading import Outline, named
from popo_lightning.policy import PolicyModule

sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_families import make

__all__ = ["llm"]

# Experts packed in several ways, changed names, routers with a bias in a buffer, fused projections, and none of these.
KINDS = ("qwen3_moe", "mixtral", "phimoe", "granitemoe", "deepseek_v3", "jamba", "gpt_oss", "minimax_m2", "llama")


def saved(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def policy_of(folder: Path) -> Any:
    return attached(PolicyModule(path=str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_is_what_a_checkpoint_has(kind: str, tmp_path: Path) -> None:
    policy, expected = policy_of(make(kind, tmp_path)), saved(tmp_path)
    sent = dict(policy.as_saved(policy.named_weights()))
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())


def test_weights_that_moved_are_sent(tmp_path: Path) -> None:
    policy = policy_of(make("qwen3_moe", tmp_path))
    before = {name: tensor.clone() for name, tensor in policy.as_saved(policy.named_weights())}
    assert sum("experts.3." in name for name in before) == 6
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1)
    sent = dict(policy.as_saved(policy.named_weights()))
    assert all(torch.equal(sent[name], tensor + 1) for name, tensor in before.items())


def test_a_layer_at_a_time(tmp_path: Path) -> None:
    """A large model's experts must not all be held at once. A layer's are sent before the next are requested."""
    policy = policy_of(make("qwen3_moe", tmp_path))
    asked: list[str] = []

    def watched() -> Any:
        for name, weight in policy.named_weights():
            asked.append(name)
            yield name, weight

    for name, _ in policy.as_saved(watched()):
        if "layers.0." in name:
            assert not any("layers.1." in each for each in asked[:-1])


def test_checkpoints_that_are_packed_stay_packed(tmp_path: Path) -> None:
    """transformers may save packed checkpoints. The engine then gets weights as it loaded them."""
    policy = policy_of(make("qwen3_moe", tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    save_file({name: weight.contiguous() for name, weight in policy.named_weights()}, file, {"format": "pt"})
    packed = policy_of(tmp_path)
    assert dict(packed.as_saved(packed.named_weights())).keys() == saved(tmp_path).keys()
    assert any(name.endswith("experts.gate_up_proj") for name in saved(tmp_path))


def test_ranks_that_have_loaded_nothing_send_the_same(tmp_path: Path) -> None:
    """Under FSDP2 such ranks build the model from an outline that is sent as bytes."""
    import pickle

    policy = policy_of(make("qwen3_moe", tmp_path))
    built = pickle.loads(pickle.dumps(Outline.of(policy.model))).build()
    assert dict(as_saved(built, named(policy.model).items())).keys() == saved(tmp_path).keys()
    assert built.logit_form == policy.model.logit_form


def test_a_run_tells_its_engine(policy: Path, tmp_path: Path) -> None:
    told: list[EngineContext] = []

    class Told(TransformersEngine):
        def start(self, context: EngineContext) -> None:
            told.append(context)
            super().start(context)

    run = fit(policy, tmp_path, engine=Told(), iterations=1)
    assert told[0].as_saved == run.module.as_saved
    assert told[0].responses == 10 * 4


def test_vllm_is_given_what_a_checkpoint_has(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.engines.vllm.engine.end_token_ids", lambda folder, tokenizer: [1])
    engine = started("cpu")
    engine._context = replace(engine._context, as_saved=lambda weights: ((n, 10 * w) for n, w in weights))
    engine.update_weights([("a", torch.tensor(1.0)), ("b", torch.tensor(2.0))], 0)
    assert "reload 10 20" in llm.calls
