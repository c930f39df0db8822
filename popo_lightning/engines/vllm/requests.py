"""Prompts and sampling settings as vLLM takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from popo_lightning.engines.base import Sampling, prompt_seeds
from popo_lightning.model.prompts import Prompt


def engine_input(prompt: Prompt) -> dict[str, Any]:
    """What vLLM is given. It runs the model's own processor over images and expands their tokens by itself."""
    if not prompt.images:
        return {"prompt_token_ids": prompt.ids.tolist()}
    return {"prompt_token_ids": list(prompt.unexpanded_ids), "multi_modal_data": {"image": list(prompt.pictures)}}


def request_number(request: str) -> str:
    """Of a request: inside, vLLM puts random characters behind it."""
    return request.partition("-")[0]


def sampling_parameters(
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    seed: int,
    forbidden: Iterable[int],
    stop_token_ids: Sequence[int],
) -> list[Any]:
    """One for each prompt. Without a seed of their own vLLM would draw all from one global generator or another.

    Args:
        prompts: What is asked.
        n: Responses each.
        sampling: How tokens are drawn.
        seed: Decides all draws.
        forbidden: Tokens that are never drawn.
        stop_token_ids: Tokens that end a response.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    biases = {token: -float("inf") for token in forbidden}
    return [
        SamplingParams(
            n=n,
            seed=own_seed,  # of the first response; the others have those that follow
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens - prompt.begun,
            stop_token_ids=stop_token_ids,
            logprobs=0,  # the sampled token's own
            logit_bias=biases or None,
            stop=list(sampling.stop),
            # what vLLM would write for every token, one by one, is done here for whole responses; but it finds no
            # stop string in what it has not written
            detokenize=bool(sampling.stop),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for prompt, own_seed in zip(prompts, prompt_seeds(seed, len(prompts)), strict=True)
    ]
