"""Log-probs of families that scale or cap their logits after the head."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.tiny_models import attached, random_model

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.model import logprobs
from popo_lightning.model.loading import load_trainable
from popo_lightning.model.logit_form import PLAIN, LogitForm, logit_form
from popo_lightning.policy import PolicyModule

sys.path.insert(0, str(REPOSITORY / "scripts"))
from tiny_families import make

FORMS = {
    "granite": LogitForm(0.25),  # divides by logits_scaling
    "hyperclovax": LogitForm(0.5),  # multiplies by it
    "minicpm3": LogitForm(4.0),  # divides the states before the head
    "cohere": LogitForm(0.5),
    "falcon_h1": LogitForm(0.5),
    "gemma2": LogitForm(1.0, 5.0),
    "nanochat": LogitForm(1.0, 15.0),
    "opt": PLAIN,  # calls its decoder instead of its base model
}


@pytest.mark.parametrize("kind", FORMS)
def test_log_probs_are_those_of_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    policy: Any = attached(PolicyModule(path=str(make(kind, tmp_path)), temperature=0.8))
    assert policy.model.logit_form == FORMS[kind]
    prompt, ids = torch.tensor([3, 9, 4]), torch.tensor([5, 12, 7, 20, 1])
    group = Group(0, Problem("0", "", None), prompt, [Response(ids, torch.zeros(5), "stop", "")], 0)
    (found,) = policy.logprobs(Minibatch([group], 0, 0))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.cat((prompt, ids))[None]).logits[0, 2:-1].float()
    expected = (logits / 0.8).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", [LogitForm(0.3), LogitForm(2.0, 1.5)])
def test_gradients_and_chunks(form: LogitForm, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, dtype=torch.float64)
    states, targets = torch.randn(9, 8, dtype=torch.float64, requires_grad=True), torch.arange(9)
    expected = (form.of(head(states).float()) / 0.7).log_softmax(-1).gather(-1, targets[:, None]).sum()
    wanted = torch.autograd.grad(expected, [states, head.weight])
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary, device: 4)
    logp, _ = logprobs.token_logprobs(states, head, targets, 0.7, form=form)
    found = torch.autograd.grad(logp.sum(), [states, head.weight])
    torch.testing.assert_close(logp.sum(), expected)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_scale_goes_into_the_temperature_of_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is for CUDA. A cap cannot be part of the temperature, so the plain pass computes it."""
    asked: list[float] = []
    monkeypatch.setattr(logprobs, "fuses", lambda head: True)
    monkeypatch.setattr(logprobs, "fused_logprobs", lambda h, head, t, temperature, *others: asked.append(temperature))
    states: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    head, targets = torch.nn.Linear(4, 6), torch.arange(3)
    logprobs.token_logprobs(states, head, targets, 0.8, form=LogitForm(0.5))
    assert asked == [1.6]


def test_logits_that_no_form_explains_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    folder, forward = random_model("llama-tied", tmp_path), LlamaForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1]) / 10
        return out

    assert logit_form(load_trainable(folder, torch.float32, False)) == PLAIN
    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(SettingError, match="a LlamaForCausalLM, whose logits are no scaled or capped outputs"):
        load_trainable(folder, torch.float32, False)


def test_capped_attention_is_computed_and_not_left_out(tmp_path: Path) -> None:
    """sdpa, the default of transformers, does not support a cap."""
    folder = make("gemma2", tmp_path)
    assert load_trainable(folder, torch.float32, False).config._attn_implementation == "eager"
    with pytest.raises(SettingError, match=r"model\.attention is sdpa, .* set it to eager"):
        load_trainable(folder, torch.float32, False, "sdpa")
