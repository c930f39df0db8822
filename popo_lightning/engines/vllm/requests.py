"""Converts prompts and sampling settings to vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from popo_lightning.engines.base import Ask, Sampling
from popo_lightning.model.prompts import Prompt


def engine_input(prompt: Prompt) -> dict[str, Any]:
    """Input of vLLM for a prompt. vLLM runs the model's own processor over images and expands their tokens itself."""
    if not prompt.images:
        return {"prompt_token_ids": prompt.ids.tolist()}
    return {"prompt_token_ids": list(prompt.unexpanded_ids), "multi_modal_data": {"image": list(prompt.pil_images)}}


def request_number(request: str) -> str:
    """Number of a request, without the random characters that vLLM appends."""
    return request.partition("-")[0]


def request_settings(
    asked: Ask, sampling: Sampling, limit: int, ends: Iterable[int], forbidden: Iterable[int]
) -> dict[str, Any]:
    """VLLM's sampling parameters of a request, in its process or to a server.

    Args:
        asked: The request.
        sampling: How to draw tokens.
        limit: Maximum number of tokens.
        ends: Tokens that end a response.
        forbidden: Tokens that are never drawn.
    """
    return {
        "n": asked.n,
        # of the first response; those of the others follow it; without one, vLLM would draw from a global generator
        "seed": asked.seed,
        "temperature": asked.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": limit,
        "stop_token_ids": list(ends),
        "logprobs": 0,  # the sampled token's own
        # minus infinity in Python's JSON, which a server reads with Python
        "logit_bias": {token: -float("inf") for token in forbidden} or None,
        "stop": list(sampling.stop),
        # vLLM would write text token by token, which is done here for whole responses; but vLLM finds stop strings only
        # in text that it has written
        "detokenize": bool(sampling.stop),
    }


def sampling_parameters(
    prompts: Sequence[Prompt], asked: Sequence[Ask], sampling: Sampling, ends: Iterable[int], forbidden: Iterable[int]
) -> list[Any]:
    """Returns :func:`request_settings` of all requests of a call, as vLLM's own objects."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    found = []
    for each in asked:
        limit = sampling.max_new_tokens - prompts[each.place].prefix_len
        settings = request_settings(each, sampling, limit, ends, forbidden)
        found.append(SamplingParams(**settings, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY))
    return found
