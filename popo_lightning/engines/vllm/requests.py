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


def sampling_parameters(
    prompts: Sequence[Prompt],
    asked: Sequence[Ask],
    sampling: Sampling,
    forbidden: Iterable[int],
    stop_token_ids: Sequence[int],
) -> list[Any]:
    """Sampling parameters of each request. Without its own seed, a request would draw from a global generator.

    Args:
        prompts: Prompts of the call.
        asked: Requests of the call.
        sampling: How to draw tokens.
        forbidden: Tokens that are never drawn.
        stop_token_ids: Tokens that end a response.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    biases = {token: -float("inf") for token in forbidden}
    return [
        SamplingParams(
            n=each.n,
            seed=each.seed,  # of the first response; those of the others follow it
            temperature=each.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens - prompts[each.place].prefix_len,
            stop_token_ids=stop_token_ids,
            logprobs=0,  # the sampled token's own
            logit_bias=biases or None,
            stop=list(sampling.stop),
            # vLLM would write text token by token, which is done here for whole responses; but vLLM finds stop strings
            # only in text that it has written
            detokenize=bool(sampling.stop),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for each in asked
    ]
