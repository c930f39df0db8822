"""Checks a server's answers before any of them is trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from popo_lightning.engines.stop_strings import StopStrings


class MalformedAnswerError(Exception):
    """An answer does not have the requested form."""


class WrongVersionError(Exception):
    """An answer was sampled, at least in part, with other weights than those last sent."""


@dataclass(frozen=True)
class Asked:
    """What an answer must match.

    Args:
        prompt_ids: (P,) tokens of the prompt.
        n: Number of responses.
        limit: Maximum tokens per response.
        ends: Tokens that end a response; empty if only the server knows them.
        forbidden: Tokens never to be sampled.
        vocabulary: Number of tokens of the model.
        label: Version of the weights, as the server names it.
        stop: Strings that also end a response.
    """

    prompt_ids: Sequence[int]
    n: int
    limit: int
    ends: Collection[int]
    forbidden: Collection[int]
    vocabulary: int
    label: str
    stop: StopStrings


class Sampled(NamedTuple):
    """One response as received."""

    token_ids: list[int]
    logps: list[float]
    finish_reason: str


def sampled(answer: Any, asked: Asked) -> list[Sampled]:
    """Reads the responses in an answer of /inference/v1/generate.

    Raises:
        MalformedAnswerError: The answer is not what was asked for.
        WrongVersionError: The answer was sampled with other weights.
    """
    choices = _field(answer, "choices", list)
    if _field(answer, "prompt_token_ids", list) != list(asked.prompt_ids):
        raise MalformedAnswerError("it answers another prompt")
    if len(choices) != asked.n:
        raise MalformedAnswerError(f"it has {len(choices)} responses instead of {asked.n}")
    by_index = {_field(choice, "index", int): choice for choice in choices}
    if sorted(by_index) != list(range(asked.n)):
        raise MalformedAnswerError("its responses are not numbered one by one")
    for choice in choices:
        _check_version(choice, asked.label)
    return [_response(by_index[index], asked) for index in range(asked.n)]


def _check_version(choice: Any, label: str) -> None:
    versions = {_field(span, "version", str) for span in _field(choice, "weight_versions", list)}
    if versions != {label}:
        raise WrongVersionError(f"it was sampled with weights {_short(sorted(versions))} instead of {label}")


def _response(choice: Any, asked: Asked) -> Sampled:
    ids = _field(choice, "token_ids", list)
    if not 1 <= len(ids) <= asked.limit:
        raise MalformedAnswerError(f"a response has {len(ids)} tokens, of at least 1 and at most {asked.limit}")
    for token in ids:
        if type(token) is not int or not 0 <= token < asked.vocabulary:
            raise MalformedAnswerError(f"{_short(token)} is no token of the model")
    if not set(asked.forbidden).isdisjoint(ids):
        raise MalformedAnswerError("it has a token that was forbidden")
    reason = _field(choice, "finish_reason", str)
    if reason not in ("stop", "length"):
        raise MalformedAnswerError(f"a response ended by {_short(reason)}")
    ended = [token in asked.ends for token in ids]
    cut = reason == "stop" and not ended[-1] and asked.stop.cut(ids) is not None
    if any(ended[:-1]) or (asked.ends and ended[-1] != (reason == "stop") and not cut):
        raise MalformedAnswerError("a response continues after its end, or ends without one")
    if reason == "length" and len(ids) != asked.limit:
        raise MalformedAnswerError(f"a response of {len(ids)} tokens is said to have met the limit of {asked.limit}")
    return Sampled(ids, _logps(choice, ids), reason)


def _logps(choice: Any, ids: Sequence[int]) -> list[float]:
    content = _field(_field(choice, "logprobs", dict), "content", list)
    if [_field(entry, "token_id", int) for entry in content] != list(ids):
        raise MalformedAnswerError("its log-probs are of other tokens")
    logps = [_field(entry, "logprob", float) for entry in content]
    for logp in logps:
        # -9999 stands for minus infinity and for nan, and no such token can have been drawn
        if not math.isfinite(logp) or not -9999 < logp <= 0:
            raise MalformedAnswerError(f"{logp} is no log-prob of a token that was drawn")
    return logps


def _field(holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise MalformedAnswerError(f"it has no {name}, or not as {kind.__name__}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]
