"""A decoding step's attention: its mask is transformers' own, it waits for no device, and it copies no keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pictures import asked as pictured
from helpers.pictures import picture
from helpers.tiny_models import random_model, random_vision_model
from torch import Tensor

from popo_lightning.engines import decoding, step_attention
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.prompts import Prompt, PromptEncoder


def started(folder: Path, dtype: torch.dtype = torch.float32) -> TransformersEngine:
    engine = TransformersEngine(batch_size=5)
    engine.start(EngineContext(folder, torch.device("cpu"), dtype, 0, 1, 80, [4, 17]))
    return engine


def prompts_of(lengths: Sequence[int]) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    return [Prompt(torch.randint(2, 23, (length,), generator=draw)) for length in lengths]


def made(name: str, folder: Path) -> tuple[Path, list[Prompt]]:
    """Returns a model and prompts for it."""
    if name != "vision":
        return random_model(name, folder), prompts_of((3, 12, 1, 7))
    path = random_vision_model(folder)
    problems = [pictured("one", "<image>1+2", picture(84, 56, 1)), pictured("text", "3*4")]
    return path, [PromptEncoder(path, 100).encode(problem) for problem in problems]


def drawn(engine: TransformersEngine, prompts: Sequence[Prompt]) -> list[tuple[list[int], list[float]]]:
    """Returns tokens and log-probs of all responses."""
    responses = [r for of in engine.generate(prompts, 3, Sampling(12), 5) for r in of]
    return [(response.token_ids.tolist(), response.behave_logp.tolist()) for response in responses]


class Refuses:
    """Fails in a decoding step, and works in a prompt's pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.stepping = False
        step, function = decoding.Decoder._step, _named(name)

        def steps(decoder: Any, *args: Any) -> None:
            self.stepping = True
            step(decoder, *args)
            self.stepping = False

        def refuses(*args: Any) -> Any:
            assert not self.stepping, f"{name} in a step"
            return function(*args)

        monkeypatch.setattr(decoding.Decoder, "_step", steps)
        monkeypatch.setattr(name, refuses)


def _named(name: str) -> Any:
    from importlib import import_module

    module, _, function = name.rpartition(".")
    return getattr(import_module(module), function)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "vision"])
def test_a_step_does_not_ask_what_its_mask_hides(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking would wait for the device. The mask is that of transformers, so all numbers are equal bit for bit."""
    folder, prompts = made(name, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "takes_whole_masks", lambda model: False)
        expected = drawn(started(folder), prompts)
        Refuses(patch, "transformers.masking_utils.fast_all")
        with pytest.raises(AssertionError, match="fast_all in a step"):
            drawn(started(folder), prompts)
    Refuses(monkeypatch, "transformers.masking_utils.fast_all")
    assert drawn(started(folder), prompts) == expected


def test_which_models_take_whole_masks() -> None:
    def takes(**changes: Any) -> bool:
        plain = {"_attn_implementation": "sdpa", "rope_parameters": {"rope_theta": 1e4}}
        config = SimpleNamespace(**plain | changes)
        return step_attention.takes_whole_masks(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)))

    assert takes() and takes(layer_types=["full_attention"], sliding_window=None, alibi=False)
    for other in (
        {"_attn_implementation": "eager"},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 4096},
        {"alibi": True},
        {"rope_parameters": None},
    ):
        assert not takes(**other), other


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "vision"])
def test_query_heads_share_keys_without_copies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. In float64 the draws are those of transformers' sdpa, which copies the keys for each head."""
    folder, prompts = made(name, tmp_path)
    engine = started(folder, torch.float64)
    config = engine._model.config.get_text_config()
    assert config.num_attention_heads > config.num_key_value_heads
    expected = drawn(engine, prompts)
    step_attention.use_step_attention(engine._model)
    Refuses(monkeypatch, "transformers.integrations.sdpa_attention.repeat_kv")
    found = drawn(engine, prompts)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, mine), (_, plain) in zip(found, expected, strict=True):
        assert mine == pytest.approx(plain, abs=1e-6)  # kept in float32


def test_anything_but_a_step_with_a_mask_is_as_with_sdpa() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    key, value = numbers(2, 4, 7, 8), numbers(2, 4, 7, 5)
    mask = torch.arange(7) >= torch.tensor([0, 3])[:, None]
    bias = numbers(1, 12, 1, 7)
    for count, seen, others in (
        (1, mask[:, None, None], {"scaling": 0.3}),
        (1, mask[:, None, None], {}),
        (1, mask[:, None, None].expand(2, 12, 1, 7), {}),
        (1, None, {}),
        (1, mask[:, None, None], {"position_bias": bias}),
        (3, mask[:, None, None].expand(2, 1, 3, 7), {"scaling": 0.3}),
    ):
        query = numbers(2, 12, count, 8)
        mine, _ = step_attention.step_attention(module, query, key, value, seen, **others)
        plain, _ = sdpa_attention_forward(module, query, key, value, seen, **others)
        torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-12)
