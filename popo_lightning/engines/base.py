"""The slot of a rollout engine."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.peak_memory import take_peak_bytes
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.model.prompts import Prompt

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    Training always samples from the policy's own distribution at some temperature (top_p 1, top_k off). Only then are
    the recorded log-probs those of the distribution sampled from. Evaluation may use top_p and top_k.

    Args:
        max_new_tokens: Response limit in tokens, including the end token and a prefix that the prompt contains.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling probability mass.
        top_k: Number of most likely tokens to sample from; 0 means all.
        stop: Strings that end a response, see :class:`StopStrings`.
        temperature_spread: Half the width of the range around `temperature` from which each response draws one of its
            own; 0 samples all at `temperature`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    temperature_spread: float = 0.0

    def temperature_of(self, seed: int) -> float | None:
        """The temperature of one response: uniform in the range, and decided by the response's seed.

        Args:
            seed: Seed of the response: its prompt's seed plus its index among the prompt's responses.

        Returns:
            The temperature, or None without a spread, since then all responses have `temperature`.
        """
        if not self.temperature_spread:
            return None
        low, high = self.temperature - self.temperature_spread, self.temperature + self.temperature_spread
        return random.Random(f"{seed}/temperature").uniform(low, high)


@dataclass(frozen=True)
class EngineContext:
    """What an engine receives when it starts, once the strategy has set up the process group.

    Args:
        folder: Model folder or hub id, the same that the policy was loaded from.
        device: Device of this rank.
        dtype: Type of the policy's matrix multiplications, and of synced weights.
        rank: Global rank; each rank has an engine of its own.
        world_size: Number of ranks.
        max_tokens: Maximum length of prompt plus response.
        forbidden_token_ids: Tokens never to sample, because the policy cannot read them back (image tokens).
        image_pixels: Minimum and maximum pixels of an image in the prompts; None keeps the processor's own limits.
        images_per_prompt: Maximum number of images per prompt.
        local_rank: Rank on this machine.
        as_saved: Gives the policy's weights the names and shapes of the checkpoint that it was loaded from, for engines
            that do not load it with transformers.
        responses: Responses that this rank samples in an iteration; None if unknown.
    """

    folder: str | Path
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    max_tokens: int
    forbidden_token_ids: Sequence[int] = ()
    image_pixels: tuple[int, int] | None = None
    images_per_prompt: int = 0
    local_rank: int = 0
    as_saved: Callable[[NamedTensors], NamedTensors] = iter
    responses: int | None = None


class RolloutEngine(ABC):
    """Samples responses with the weights of the last update.

    Attributes:
        version: Policy version of those weights; -1 before the first update.
        holds_weights: Whether the engine still has its weights; a deep sleep may have dropped them.
        generates_while_training: Whether :meth:`generate` may run in another thread while the trainer works. It then
            needs memory, cores and weights of its own, and must never change the process's random state.
        spreads_temperature: Whether it samples each response at its own :meth:`Sampling.temperature_of`.
        checked: Whether its log-probs are compared with the trainer's before a run trains.
        loads_model: Whether it can sample with the model's own weights before the first update.
    """

    version: int = -1
    holds_weights: bool = True
    generates_while_training: bool = False
    spreads_temperature: bool = False
    checked: bool = True
    loads_model: bool = True

    def check(self, device: torch.device) -> None:  # noqa: B027  # most engines compute wherever the trainer does
        """Raises SettingError if the engine cannot sample beside such a trainer. Called before any model loads.

        Args:
            device: Device of the trainer.
        """

    @abstractmethod
    def start(self, context: EngineContext) -> None:
        """Loads the model. Called once per process, after distributed set-up, before anything else."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        """Samples n responses for each prompt.

        Args:
            prompts: Prompts with their images.
            n: Number of responses per prompt.
            sampling: How to draw tokens.
            seed: Seed of every draw in this call; the process's own random state does not change.

        Returns:
            For each prompt in order, n responses with token ids (end token included, or those that complete a stop
            string, and nothing after it) and the log-probs of the distribution sampled from, temperature applied.
        """

    def stream(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """Like :meth:`generate`, but yields responses while others are still being sampled, so that they can be graded.

        Yields:
            Batches (possibly empty) of (prompt index, n responses) as they finish. Every index appears exactly once, in
            any order.
        """
        yield list(enumerate(self.generate(prompts, n, sampling, seed)))

    @abstractmethod
    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Replaces all weights, drops every cache computed with the old ones and sets the version."""

    def forget_prompts(self) -> None:  # noqa: B027
        """Drops cached prompts, so that the next samples do not depend on earlier ones."""

    def sleep(self) -> None:  # noqa: B027  # an engine without memory to spare has nothing to do
        """Frees what generation needs while the trainer works."""

    def wake(self) -> None:  # noqa: B027
        """Undoes :meth:`sleep` far enough that the weights can be updated."""

    def take_peak_bytes(self, device: torch.device) -> int:
        """Returns the peak memory on this rank's GPU since the last call, in bytes, of engine and trainer together."""
        return take_peak_bytes(device)

    def stop(self) -> None:  # noqa: B027
        """Frees the model for good."""


def prompt_seeds(seed: int, count: int) -> list[int]:
    """A seed below 2^62 for each prompt of a call. A prompt's draws do not depend on the other prompts.

    Args:
        seed: Seed of the call.
        count: Number of prompts.
    """
    return [random.Random(f"{seed}/{place}").getrandbits(62) for place in range(count)]


@dataclass(frozen=True)
class Ask:
    """One request to an engine that samples several responses of a prompt at one temperature.

    Args:
        place: Index of the prompt in the call.
        n: Number of responses.
        seed: Seed of the first response; those of the others follow it.
        temperature: Temperature of all responses.
    """

    place: int
    n: int
    seed: int
    temperature: float


def asks(count: int, n: int, sampling: Sampling, seed: int) -> list[Ask]:
    """Splits a call into requests: one per prompt, or one per response if each has its own temperature.

    Args:
        count: Number of prompts.
        n: Number of responses per prompt.
        sampling: How to draw tokens.
        seed: Seed of the call.
    """
    seeds = prompt_seeds(seed, count)
    if not sampling.temperature_spread:
        return [Ask(place, n, own, sampling.temperature) for place, own in enumerate(seeds)]
    found = [(place, own + i) for place, own in enumerate(seeds) for i in range(n)]
    return [Ask(place, 1, own, sampling.temperature_of(own) or sampling.temperature) for place, own in found]


def end_token_ids(folder: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a response: those of the model's generation config, and the tokenizer's end token.

    Without a generation config, the model's configuration names them, as in transformers and vLLM. The tokenizer's end
    token may be another one. vLLM always ends at it, so every engine does.

    Args:
        folder: Model folder or hub id.
        tokenizer: Its tokenizer.

    Raises:
        SettingError: The generation config names an end that is no token.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        ends = AutoConfig.from_pretrained(folder).get_text_config().eos_token_id
    named = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if wrong := [end for end in named if not isinstance(end, int) or end < 0]:
        raise SettingError(
            f"model.path is '{folder}', whose eos_token_id has {wrong[0]!r}, which is no token; write the tokens that "
            "end a response there"
        )
    own = tokenizer.eos_token_id
    return sorted({*named, *([] if own is None else [own])})


def responses_of(
    tokenizer: Any,
    sampled: Sequence[tuple[Sequence[int], Sequence[float], str]],
    stop: Sequence[str] = (),
    temperatures: Sequence[float] | None = None,
) -> list[Response]:
    """Makes responses of (token ids, their log-probs, finish reason) that end with the first stop string, if any.

    Their text excludes special tokens, an end token that the tokenizer treats as an ordinary one, and the stop string.

    Args:
        tokenizer: Tokenizer of the model.
        sampled: What the engine drew.
        stop: Strings that end a response.
        temperatures: Temperature of each response, if each has its own.
    """
    strings = StopStrings(tokenizer, stop)
    spoken = [ids[:-1] if reason == "stop" else ids for ids, _, reason in sampled]
    texts = tokenizer.batch_decode(spoken, skip_special_tokens=True)
    own: Sequence[float | None] = temperatures or [None] * len(sampled)
    found = []
    for (ids, logp, reason), text, temperature in zip(sampled, texts, own, strict=True):
        if (cut := strings.cut(ids)) is not None:
            kept, text = cut
            ids, logp, reason = ids[:kept], logp[:kept], "stop"
        tokens, logps = torch.tensor(ids, dtype=torch.long), torch.tensor(logp, dtype=torch.float32)
        found.append(Response(tokens, logps, reason, text, temperature=temperature))
    return found
