"""Compares the transformers engine with a loop without a cache, one response at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import attached, random_model
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.engines import decoding
from popo_lightning.engines.base import EngineContext, Sampling, prompt_seeds
from popo_lightning.engines.sampling import uniforms
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.prompts import Prompt
from popo_lightning.policy import PolicyModule

ENDS = [1, 9]
FORBIDDEN = [4, 17]
LIMIT = 14


def started(folder: Path, batch_size: int, dtype: torch.dtype = torch.float64) -> TransformersEngine:
    """Starts an engine, in float64 unless told otherwise. There, draws do not depend on the other rows of a batch."""
    engine = TransformersEngine(batch_size)
    engine.start(EngineContext(folder, torch.device("cpu"), dtype, 0, 1, 400, FORBIDDEN))
    engine._ends = torch.tensor(ENDS)
    return engine


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp(request.param))


def asked() -> list[Prompt]:
    """Returns prompts of uneven lengths. Two have the same length, and two have begun their responses."""
    generator = torch.Generator().manual_seed(3)
    lengths = (3, 12, 1, 40, 12, 7)
    prefix_lens = (0, 0, 0, 5, 0, 2)
    made = [torch.randint(2, 23, (length,), generator=generator) for length in lengths]
    return [Prompt(ids, prefix_len=count) for ids, count in zip(made, prefix_lens, strict=True)]


def reference(model: Any, prompt: Tensor, seed: int, limit: int, sampling: Sampling) -> tuple[list[int], list[float]]:
    """Samples one response: for every token the whole text runs through the model, and a cumulative sum decides."""
    ids, logps = prompt.tolist(), []
    for uniform in uniforms([seed], limit)[0].tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        logits[FORBIDDEN] = -torch.inf
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        inside = (logp.exp().cumsum(-1) > uniform).nonzero()
        token = int(logp.argmax() if sampling.temperature == 0 else inside[0])
        ids.append(token)
        logps.append(float(logp[token]))
        if token in ENDS:
            break
    return ids[len(prompt) :], logps


@pytest.mark.parametrize("batch_size", [512, 5, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_as_one_at_a_time_without_a_cache(folder: Path, batch_size: int, temperature: float) -> None:
    """Rows join and leave in another order with each batch size, which changes no response."""
    engine, prompts, sampling, n = started(folder, batch_size), asked(), Sampling(LIMIT, temperature), 3
    sampled = engine.generate(prompts, n, sampling, 11)
    reasons = set()
    for prompt, seed, responses in zip(prompts, prompt_seeds(11, len(prompts)), sampled, strict=True):
        assert len(responses) == n
        for i, response in enumerate(responses):
            limit = LIMIT - prompt.prefix_len
            ids, logps = reference(engine._model, prompt.ids, seed + i, limit, sampling)
            assert response.token_ids.tolist() == ids
            torch.testing.assert_close(response.behave_logp, torch.tensor(logps), atol=1e-5, rtol=0)
            assert response.behave_logp.dtype == torch.float32
            assert response.finish_reason == ("stop" if ids[-1] in ENDS else "length")
            assert len(ids) == limit or ids[-1] in ENDS
            reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"} or temperature == 0


@pytest.mark.parametrize("batch_size", [512, 5])
def test_each_response_at_a_temperature_of_its_own(folder: Path, batch_size: int) -> None:
    engine, prompts, sampling = started(folder, batch_size), asked(), Sampling(LIMIT, 1.0, temperature_spread=0.5)
    sampled = engine.generate(prompts, 3, sampling, 11)
    for prompt, seed, responses in zip(prompts, prompt_seeds(11, len(prompts)), sampled, strict=True):
        for i, response in enumerate(responses):
            assert response.temperature == sampling.temperature_of(seed + i)
            alone = Sampling(LIMIT, response.temperature or 0.0)
            ids, logps = reference(engine._model, prompt.ids, seed + i, LIMIT - prompt.prefix_len, alone)
            assert response.token_ids.tolist() == ids
            torch.testing.assert_close(response.behave_logp, torch.tensor(logps), atol=1e-5, rtol=0)


def test_a_sliding_window_is_a_matter_of_the_mask(tmp_path: Path) -> None:
    engine, prompts, sampling = started(sliding(tmp_path, "sliding_attention"), 5), asked(), Sampling(LIMIT)
    sampled = engine.generate(prompts, 1, sampling, 2)
    for prompt, seed, (response,) in zip(prompts, prompt_seeds(2, len(prompts)), sampled, strict=True):
        ids, _ = reference(engine._model, prompt.ids, seed, LIMIT - prompt.prefix_len, sampling)
        assert response.token_ids.tolist() == ids


def test_layers_without_keys_and_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.engine is TransformersEngine, .*layers of type linear_attention"):
        started(sliding(tmp_path, "linear_attention"), 5)


def sliding(folder: Path, kind: str) -> Path:
    """Makes a Qwen2 whose second layer has another type and attends to the last 6 tokens."""
    config = json.loads((random_model("qwen2", folder) / "config.json").read_text())
    window = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", kind]}
    (folder / "config.json").write_text(json.dumps(config | window))
    return folder


def tokens(sampled: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in responses] for responses in sampled]


def test_a_prompts_draws_depend_on_its_seed_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws do not depend on other prompts, the number of responses, when rows leave, or the prompts of a pass."""
    engine, prompts, sampling = started(folder, 7), asked(), Sampling(LIMIT)
    whole = tokens(engine.generate(prompts, 4, sampling, 5))
    assert tokens(engine.generate(prompts, 2, sampling, 5)) == [responses[:2] for responses in whole]
    assert tokens(engine.generate(prompts[:2], 4, sampling, 5)) == whole[:2]
    others = [Prompt(torch.tensor([5, 6, 7])), *prompts[1:]]
    assert tokens(engine.generate(others, 4, sampling, 5))[1:] == whole[1:]
    for name, value in {"FINISHED_SHARE": 0.9, "PREFILL_TOKENS": 15, "UNUSED_SHARE": 0.0}.items():
        monkeypatch.setattr(decoding, name, value)
        assert tokens(engine.generate(prompts, 4, sampling, 5)) == whole, name


def test_looks_that_are_far_between_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, ended rows continue for a few steps, even past their limit."""
    engine, prompts, sampling = started(folder, 7), asked(), Sampling(LIMIT)
    whole = tokens(engine.generate(prompts, 4, sampling, 5))
    advance = decoding.Decoder._advance

    def rarely(self: decoding.Decoder, flight: decoding.Flight) -> Tensor:
        self.steps_unread = 5
        return advance(self, flight)

    monkeypatch.setattr(decoding.Decoder, "_advance", rarely)
    assert tokens(engine.generate(prompts, 4, sampling, 5)) == whole


def test_seeds_decide_and_random_states_do_not(folder: Path) -> None:
    engine, prompts, sampling = started(folder, 7), asked(), Sampling(LIMIT)
    first = tokens(engine.generate(prompts, 4, sampling, 5))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    other = tokens(engine.generate(prompts, 4, sampling, 6))  # a call in between, with another seed
    assert tokens(engine.generate(prompts, 4, sampling, 5)) == first
    after = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    assert states[:2] == after[:2] and torch.equal(states[2], after[2])
    same = [a == b for left, right in zip(first, other, strict=True) for a, b in zip(left, right, strict=True)]
    assert sum(same) < len(same) / 4
    everything = [tuple(ids) for responses in first for ids in responses]
    assert len(set(everything)) > len(everything) * 3 / 4


def test_prompts_come_as_they_finish(folder: Path) -> None:
    """A prompt is yielded with its last response, while others still run. Each is yielded once, as in generate."""
    engine, prompts, sampling = started(folder, 6), asked(), Sampling(LIMIT)
    steps = list(engine.stream(prompts, 3, sampling, 5))
    come = [place for step in steps for place, _ in step]
    assert sorted(come) == list(range(len(prompts)))
    assert len([step for step in steps if step]) > 2
    found = dict(ready for step in steps for ready in step)
    assert tokens([found[place] for place in range(len(prompts))]) == tokens(engine.generate(prompts, 3, sampling, 5))


def test_rows_that_have_ended_are_not_computed(folder: Path) -> None:
    """Work follows the number of sampled tokens, not the longest response. A prompt is read once for its group."""
    engine, sampling, prompts = started(folder, 64), Sampling(60), asked()[:3] * 4
    seen: list[tuple[int, int]] = []
    engine._model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    responses = [r for rs in engine.generate(prompts, 4, sampling, 5) for r in rs]
    assert seen[0] == (len(prompts), 12)
    drawn = sum(len(response.token_ids) - 1 for response in responses)  # the prompt's pass gives the first token
    computed = sum(rows for rows, _ in seen[1:])
    longest = max(len(response.token_ids) for response in responses)
    assert drawn <= computed < 1.35 * drawn < 0.6 * len(responses) * longest


def test_log_probs_are_the_policys(folder: Path) -> None:
    engine, prompts = started(folder, 7, torch.float32), asked()
    policy = attached(PolicyModule(path=str(folder), temperature=0.7))
    policy.forbidden_token_ids = FORBIDDEN
    sampled = engine.generate(prompts, 3, Sampling(LIMIT, 0.7), 5)
    groups = [
        Group(i, Problem(str(i), "", None), prompt.ids, responses, 0)
        for i, (prompt, responses) in enumerate(zip(prompts, sampled, strict=True))
    ]
    minibatch = Minibatch(groups, 0, 0)
    # Engine and trainer compute the layers differently, in float32.
    for mine, response in zip(policy.logprobs(minibatch), minibatch.responses, strict=True):
        torch.testing.assert_close(mine, response.behave_logp, atol=1e-4, rtol=0)


def test_responses_can_be_trained_on(folder: Path) -> None:
    """Tensors made in inference mode cannot be saved for a backward pass."""
    engine = started(folder, 7)
    response = engine.generate(asked()[:1], 1, Sampling(LIMIT), 5)[0][0]
    assert not response.token_ids.is_inference() and not response.behave_logp.is_inference()


def test_a_model_that_has_diverged_is_an_error(folder: Path) -> None:
    engine = started(folder, 7)
    with torch.no_grad():
        engine._model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="diverged"):
        engine.generate(asked(), 1, Sampling(LIMIT), 5)


def test_a_call_that_is_left_early_leaves_nothing_behind(folder: Path) -> None:
    engine, prompts, sampling = started(folder, 4), asked(), Sampling(LIMIT)
    whole = tokens(engine.generate(prompts, 2, sampling, 5))
    left: Iterator[Any] = engine.stream(prompts, 2, sampling, 5)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert tokens(engine.generate(prompts, 2, sampling, 5)) == whole
