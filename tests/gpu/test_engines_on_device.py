"""Seeds decide what is sampled on the device, log-probs are the policy's, and vLLM samples the same after sleep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_task
from torch import Tensor

from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.loading import load_model
from popo_lightning.model.prompts import Prompt, PromptEncoder

pytestmark = pytest.mark.gpu

SAMPLING = Sampling(12)


def prompts(folder: Path) -> list[Prompt]:
    encoder = PromptEncoder(folder, 16)
    return [encoder.encode(problem) for problem in tiny_task().train_problems()[:12]]


def started(engine: RolloutEngine, folder: Path, device: torch.device, dtype: torch.dtype) -> RolloutEngine:
    engine.start(EngineContext(folder, device, dtype, 0, 1, 64))
    return engine


@pytest.fixture(scope="module")
def engine(policy: Path, device: torch.device) -> RolloutEngine:
    return started(TransformersEngine(), policy, device, torch.float32)


def tokens(engine: RolloutEngine, folder: Path, seed: int) -> list[list[int]]:
    found = engine.generate(prompts(folder), 4, SAMPLING, seed)
    return [response.token_ids.tolist() for responses in found for response in responses]


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def test_seeds_decide(engine: RolloutEngine, policy: Path, device: torch.device) -> None:
    """The same seed gives the same tokens, whatever is sampled in between. Another seed gives other tokens."""
    before = random_states(device)
    first = tokens(engine, policy, seed=1)
    other = tokens(engine, policy, seed=2)
    assert tokens(engine, policy, seed=1) == first != other
    torch.rand(3, device=device)
    before_again = random_states(device)
    assert tokens(engine, policy, seed=1) == first
    assert all(map(torch.equal, random_states(device), before_again)), "random state is left as it was"
    assert len(before) == len(before_again)


def test_log_probs_are_those_of_the_model(engine: RolloutEngine, policy: Path) -> None:
    """Compares with a forward pass of the same model on the CPU."""
    model = load_model(policy, torch.float32).eval()
    asked = prompts(policy)
    for prompt, responses in zip(asked, engine.generate(asked, 2, SAMPLING, 3), strict=True):
        for response in responses:
            ids = torch.cat((prompt.ids, response.token_ids))
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)[len(prompt.ids) - 1 : -1]
            expected = logp.gather(-1, response.token_ids[:, None]).squeeze(-1)
            torch.testing.assert_close(response.behave_logp, expected, rtol=0, atol=2e-4)


def test_new_weights_are_sampled_with(policy: Path, device: torch.device) -> None:
    engine = started(TransformersEngine(), policy, device, torch.float32)
    first = tokens(engine, policy, seed=1)
    kept = {name: weight.clone() for name, weight in load_model(policy, torch.float32).named_parameters()}
    engine.update_weights([(name, weight * 0.5) for name, weight in kept.items()], 1)
    assert tokens(engine, policy, seed=1) != first
    engine.update_weights(kept.items(), 2)
    assert tokens(engine, policy, seed=1) == first


def test_vllm_wakes_as_it_was(policy: Path, device: torch.device) -> None:
    """While it sleeps it frees memory. After waking and a sync it samples the same."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if device.type != "cuda":
        pytest.skip("vLLM sleeps on a GPU alone")
    from popo_lightning.engines.vllm.engine import VLLMEngine

    engine = started(VLLMEngine(gpu_memory_utilization=0.2, sleep_level=2), policy, device, torch.bfloat16)
    kept = {name: weight.bfloat16() for name, weight in load_model(policy, torch.float32).named_parameters()}
    engine.update_weights(kept.items(), 0)
    first, awake = tokens(engine, policy, seed=1), torch.cuda.mem_get_info(device)[0]
    engine.sleep()
    assert torch.cuda.mem_get_info(device)[0] > awake + 2**30
    engine.wake()
    engine.update_weights(kept.items(), 1)
    assert tokens(engine, policy, seed=1) == first
    engine.stop()
