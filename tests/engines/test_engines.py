"""Compares engines with the trainer's own log-probs, before and after weight updates, on three architectures."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stops import common, first_by_hand
from helpers.tiny_models import RANDOM, attached, random_model
from torch import Tensor
from transformers import AutoTokenizer

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling, prompt_seeds, responses_of
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.prompts import Prompt
from popo_lightning.policy import PolicyModule

END = 1  # the end token of the tiny tokenizer
FORBIDDEN = [4, 17]
LIMIT = 16
TOLERANCE = 1e-4
SAMPLING = Sampling(LIMIT)


@dataclass
class Pair:
    """An engine and the policy it samples for."""

    engine: RolloutEngine
    policy: PolicyModule

    def generate(self, sampling: Sampling = SAMPLING, seed: int = 7, n: int = 4) -> list[list[Response]]:
        return self.engine.generate([Prompt(ids) for ids in PROMPTS], n, sampling, seed)

    def gap(self, sampled: list[list[Response]], temperature: float = 1.0) -> float:
        """Returns the largest difference to the trainer's log-probs of the same tokens."""
        self.policy.temperature = temperature
        groups = [
            Group(i, Problem(str(i), "", None), prompt, responses, 0)
            for i, (prompt, responses) in enumerate(zip(PROMPTS, sampled, strict=True))
        ]
        minibatch = Minibatch(groups, 0, 0)
        logps = self.policy.logprobs(minibatch)
        recorded = [response.behave_logp for response in minibatch.responses]
        return max(float((a - b).abs().max()) for a, b in zip(logps, recorded, strict=True))

    def perturb(self, seed: int) -> None:
        """Changes every parameter, including biases and norms, and updates the engine's weights."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter += (
                    0.3
                    * parameter.std().nan_to_num(0.0).clamp(0.05)
                    * torch.randn(parameter.shape, generator=generator)
                )
        self.engine.update_weights(self.policy.named_weights(), seed)


def prompts() -> list[Tensor]:
    """Returns prompts of uneven lengths. One is longer than vLLM's cache blocks on a CPU (128 tokens)."""
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 5, 11, 300)
    return [torch.randint(2, 23, (length,), generator=generator) for length in lengths]


PROMPTS = prompts()
ENGINES: dict[str, Callable[[], RolloutEngine]] = {"transformers": lambda: TransformersEngine(5), "vllm": VLLMEngine}


MARKS = {"transformers": [], "vllm": [pytest.mark.vllm]}
PAIRS = [pytest.param((e, m), marks=MARKS[e]) for e in ENGINES for m in RANDOM]


# One process holds one vLLM at a time. The module scope and this order of parameters ensure it.
@pytest.fixture(scope="module", params=PAIRS, ids=lambda p: "-".join(p))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, kind = request.param
    folder = random_model(kind, tmp_path_factory.mktemp(kind))
    policy = attached(PolicyModule(path=str(folder)))
    policy.forbidden_token_ids = FORBIDDEN
    engine = ENGINES[name]()
    seed_everything()
    expected, threads, set_threads = draws(), torch.get_num_threads(), torch.set_num_threads
    seed_everything()
    engine.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 400, FORBIDDEN))
    assert draws() == expected
    assert threads == torch.get_num_threads() and torch.set_num_threads is set_threads
    assert torch.get_float32_matmul_precision() == "highest" and gc.get_freeze_count() == 0
    assert engine.version == -1
    yield Pair(engine, policy)
    engine.stop()


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def draws() -> tuple[float, float, float]:
    """Draws a number from every global random state."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def tokens(sampled: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in responses] for responses in sampled]


def test_log_probs_before_and_after_updates(pair: Pair) -> None:
    """Every parameter changes twice. An outdated tied head, packed copy or cached prefix would change the log-probs."""
    before = pair.generate()
    assert pair.gap(before) < TOLERANCE
    for seed in (11, 12):
        pair.perturb(seed)
        assert pair.gap(before) > 0.1, "the weights hardly moved, so agreement would prove nothing"
        after = pair.generate()
        assert pair.gap(after) < TOLERANCE
        assert pair.engine.version == seed
        before = after


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_at_a_temperature(pair: Pair, temperature: float) -> None:
    sampled = pair.generate(Sampling(LIMIT, temperature))
    assert pair.gap(sampled, temperature) < TOLERANCE
    assert pair.gap(sampled, 1.0) > 0.01


def test_log_probs_at_a_temperature_for_each_response(pair: Pair) -> None:
    """The response's seed decides its temperature. Log-probs are as if drawn alone at that temperature."""
    sampling = Sampling(LIMIT, 1.0, temperature_spread=0.4)
    sampled = pair.generate(sampling)
    own = [[response.temperature or 0.0 for response in responses] for responses in sampled]
    assert own == [[sampling.temperature_of(seed + i) for i in range(4)] for seed in prompt_seeds(7, len(PROMPTS))]
    assert len({t for of in own for t in of}) == 16 and all(0.6 <= t <= 1.4 for of in own for t in of)
    assert tokens(pair.generate(sampling)) == tokens(sampled)
    for place, of in enumerate(own):
        for i, temperature in enumerate(of):
            one = [responses[i : i + 1] for responses in sampled[place : place + 1]]
            alone = pair.generate(Sampling(LIMIT, temperature))[place][i]
            assert alone.token_ids.tolist() == one[0][0].token_ids.tolist() and alone.temperature is None
            torch.testing.assert_close(alone.behave_logp, one[0][0].behave_logp, atol=TOLERANCE, rtol=0)
    assert pair.gap(sampled, 1.0) > 0.01
    stream = dict(
        ready for step in pair.engine.stream([Prompt(ids) for ids in PROMPTS], 4, sampling, 7) for ready in step
    )
    assert tokens([stream[place] for place in range(len(PROMPTS))]) == tokens(sampled)


def test_greedy(pair: Pair) -> None:
    """Every token is the most likely one by the trainer's logits, for every response and seed."""
    sampled = pair.generate(Sampling(LIMIT, temperature=0.0), n=2)
    assert tokens(sampled) == tokens(pair.generate(Sampling(LIMIT, temperature=0.0), n=2, seed=8))
    for prompt, (first, second) in zip(PROMPTS, sampled, strict=True):
        assert first.token_ids.tolist() == second.token_ids.tolist()
        with torch.no_grad():
            logits: Any = pair.policy.model(input_ids=torch.cat((prompt, first.token_ids))[None]).logits[0]
        logits[:, FORBIDDEN] = -torch.inf
        best = logits[len(prompt) - 1 : -1].max(-1).values
        chosen = logits[len(prompt) - 1 : -1].gather(-1, first.token_ids[:, None])[:, 0]
        assert float((best - chosen).max()) < TOLERANCE


def test_seeds(pair: Pair) -> None:
    first, again, other = pair.generate(seed=1), pair.generate(seed=1), pair.generate(seed=2)
    assert tokens(first) == tokens(again)
    assert tokens(first) != tokens(other)
    for left, right in zip(first, again, strict=True):
        assert all(torch.equal(a.behave_logp, b.behave_logp) for a, b in zip(left, right, strict=True))
    pair.generate(Sampling(LIMIT, 0.7), seed=3, n=2)  # as an evaluation would, between two training calls
    assert tokens(pair.generate(seed=2)) == tokens(other)
    everything = [tuple(ids) for responses in tokens(first) for ids in responses]
    assert len(set(everything)) > len(everything) * 3 / 4  # responses of a prompt are drawn separately


def test_a_stream_brings_every_prompt_once_and_can_be_left(pair: Pair) -> None:
    asked: Any = [Prompt(ids) for ids in PROMPTS]
    steps = list(pair.engine.stream(asked, 4, SAMPLING, 1))
    come = [place for step in steps for place, _ in step]
    assert sorted(come) == [0, 1, 2, 3]
    found = dict(ready for step in steps for ready in step)
    first = pair.generate(seed=1)
    assert tokens([found[place] for place in range(4)]) == tokens(first)
    left = pair.engine.stream(asked, 4, SAMPLING, 1)
    next(iter(left))
    left.close()  # type: ignore[attr-defined]
    assert tokens(pair.generate(seed=1)) == tokens(first)
    if isinstance(pair.engine, VLLMEngine):
        assert len(steps) > 1, "responses came all at once"


def test_a_prompt_draws_the_same_whatever_is_asked_beside_it(pair: Pair) -> None:
    first = tokens(pair.generate(seed=1))
    others = [Prompt(ids) for ids in (PROMPTS[2], PROMPTS[1], PROMPTS[0], PROMPTS[3], PROMPTS[2])]
    beside = tokens(pair.engine.generate(others, 4, SAMPLING, seed=1))
    assert beside[1] == first[1] and beside[3] == first[3]
    assert beside[0] != first[2] and beside[0] != beside[4]  # the same prompt at another place has other draws
    assert tokens(pair.engine.generate(others[:2], 2, SAMPLING, seed=1))[1] == first[1][:2]


def test_more_prompt_tokens_than_a_step_takes(pair: Pair) -> None:
    """Prompts that wait for another step, and tokens sampled meanwhile, change no draw."""
    generator = torch.Generator().manual_seed(4)
    many = [Prompt(torch.randint(2, 23, (150,), generator=generator)) for _ in range(70)]
    together = tokens(pair.engine.generate(many, 2, SAMPLING, seed=1))
    assert tokens(pair.engine.generate(many[:3], 2, SAMPLING, seed=1)) == together[:3]
    assert len(together) == 70


def test_random_states_are_left_alone(pair: Pair) -> None:
    """A stream neither reads nor changes the global random states: before, between and after its steps."""
    asked = [Prompt(ids) for ids in PROMPTS]
    first = tokens(pair.generate(seed=1))
    seed_everything()
    expected = [draws() for _ in range(100)]
    seed_everything()
    found, drawn = {}, [draws()]
    for step in pair.engine.stream(asked, 4, SAMPLING, 1):
        found |= dict(step)
        drawn.append(draws())
    drawn.append(draws())
    assert drawn == expected[: len(drawn)]
    assert tokens([found[place] for place in range(4)]) == first
    if isinstance(pair.engine, VLLMEngine):
        assert len(drawn) > 10


def test_shape_and_order(pair: Pair) -> None:
    """Each prompt, in order, has n responses whose log-probs fit that prompt and no other."""
    sampled = pair.generate(n=3)
    assert [len(responses) for responses in sampled] == [3] * len(PROMPTS)
    assert pair.gap(sampled) < TOLERANCE
    assert pair.gap(sampled[1:] + sampled[:1]) > 0.1


def test_ends(pair: Pair) -> None:
    """The end token occurs exactly once, as the last token, in responses that the policy stopped, and in no others."""
    responses = [r for responses in pair.generate(Sampling(40), n=24) for r in responses]
    reasons = {response.finish_reason for response in responses}
    assert reasons == {"stop", "length"}
    for response in responses:
        ids = response.token_ids.tolist()
        assert response.token_ids.dtype == torch.long
        assert response.behave_logp.dtype == torch.float32
        assert len(ids) == len(response.behave_logp) <= 40
        assert "<" not in response.text
        if response.finish_reason == "stop":
            assert ids.count(END) == 1 and ids[-1] == END
        else:
            assert END not in ids and len(ids) == 40


@pytest.mark.parametrize("length", [1, 3])
def test_engines_stop_alike(pair: Pair, length: int) -> None:
    """Up to the stop string, tokens, log-probs and seeds are those of a response without it. The trainer agrees."""
    tokenizer = pair.engine._tokenizer  # type: ignore[attr-defined]
    for temperature in (1.0, 0.0):
        free = pair.generate(Sampling(LIMIT, temperature), n=8)
        stop = (common(free, length), "no such text")
        stopped = pair.generate(Sampling(LIMIT, temperature, stop=stop), n=8)
        reasons = set()
        for before, after in zip(chain(*free), chain(*stopped), strict=True):
            expected = first_by_hand(tokenizer, before.token_ids.tolist(), stop)
            count, text = expected or (len(before.token_ids), before.text)
            assert after.token_ids.tolist() == before.token_ids[:count].tolist()
            assert torch.allclose(after.behave_logp, before.behave_logp[:count], atol=TOLERANCE)
            assert after.text == text
            assert after.finish_reason == ("stop" if expected else before.finish_reason)
            reasons.add((expected is not None, after.finish_reason))
        assert (True, "stop") in reasons
        if temperature:
            assert len(reasons) > 1
            assert pair.gap(stopped) < TOLERANCE


def test_forbidden_tokens(pair: Pair) -> None:
    """Forbidden tokens are never sampled and get no probability. Log-probs agree only if the policy forbids them."""
    sampled = pair.generate(n=32)
    used = {token for responses in tokens(sampled) for ids in responses for token in ids}
    assert not used & set(FORBIDDEN)
    assert len(used) > 15
    pair.policy.forbidden_token_ids = []
    allowed = pair.gap(sampled)
    pair.policy.forbidden_token_ids = FORBIDDEN
    assert allowed > 0.01
    assert pair.gap(sampled) < TOLERANCE


def test_prefix_cache_is_dropped(pair: Pair) -> None:
    """The long prompt spans whole cache blocks. If it used those of the old weights, its log-probs would be wrong."""
    long, limit = PROMPTS[-1], Sampling(4)
    for seed in (21, 22):
        pair.engine.generate([Prompt(long)], 2, limit, seed)  # fills the cache
        pair.perturb(seed)
        sampled = [[], [], [], pair.engine.generate([Prompt(long)], 8, limit, seed)[0]]
        assert pair.gap(sampled) < TOLERANCE


def test_an_end_token_is_no_text(policy: Path) -> None:
    """The end token may be an ordinary token: some models end on one that their tokenizer does not mark as special."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    whole, begun = tokenizer.decode([7, 8]), tokenizer.decode([7])
    assert whole != begun
    sampled = [([7, 8], [-1.0, -2.0], "stop"), ([7, 8], [-1.0, -2.0], "length"), ([7, END], [-1.0, -2.0], "stop")]
    assert [response.text for response in responses_of(tokenizer, sampled)] == [begun, whole, begun]


def test_cut_tails(tmp_path: Path) -> None:
    """Tests truncation for evaluations: top_k keeps that many tokens, and a tiny top_p keeps the most likely one."""
    folder = random_model("llama-tied", tmp_path)
    engine = TransformersEngine()
    engine.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 400))
    (cut,) = engine.generate([Prompt(PROMPTS[0])], 200, Sampling(1, top_k=2), seed=0)
    assert len({int(r.token_ids[0]) for r in cut}) == 2
    (narrow,) = engine.generate([Prompt(PROMPTS[0])], 50, Sampling(1, top_p=0.01), seed=0)
    assert len({int(r.token_ids[0]) for r in narrow}) == 1
