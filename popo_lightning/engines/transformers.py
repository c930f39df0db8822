"""Generation with plain transformers: slower than vLLM, without its dependency, and the reference to check it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.engines.base import (
    EngineContext,
    NamedTensors,
    RolloutEngine,
    Sampling,
    end_token_ids,
    prompt_seeds,
    responses_of,
)
from popo_lightning.engines.decoding import Decoder, Finished, Row
from popo_lightning.engines.step_attention import use_step_attention
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.model.loading import load_model
from popo_lightning.model.prompts import Prompt

KEY_VALUE_LAYERS = {"full_attention", "sliding_attention"}  # transformers' types; a mask makes the window


class TransformersEngine(RolloutEngine):
    """Samples with a second copy of the model and its key-value cache.

    Each response has a random generator of its own. Its tokens depend neither on the rest of the batch nor on the
    process's random state, except where rounding, which differs with the shape of a batch, decides between two tokens.
    A prompt is computed once for all its responses. Finished responses leave the batch, and waiting ones replace them.
    transformers' own continuous batching is not used: it draws from the process's generator, which it seeds, and has no
    seed per response; scripts/bench_generation.py finds it slower on a CPU.

    Args:
        batch_size: Number of responses generated in parallel.
    """

    spreads_temperature = True

    def __init__(self, batch_size: int = 512) -> None:
        self.batch_size = at_least("data.engine.batch_size", batch_size, 1)

    def start(self, context: EngineContext) -> None:
        """Loads the model and its tokenizer.

        Raises:
            SettingError: No model loads from the folder, or its layers keep other state than keys and values.
        """
        from transformers import AutoTokenizer

        self._context = context
        self._model = load_model(context.folder, context.dtype).to(context.device).eval()
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if others := kinds - KEY_VALUE_LAYERS:
            raise SettingError(
                f"data.engine is TransformersEngine, but model.path '{context.folder}' has layers of type "
                f"{sorted(others)[0]}, whose state it cannot keep; set data.engine to "
                "popo_lightning.engines.vllm.engine.VLLMEngine"
            )
        if context.device.type == "cuda":
            use_step_attention(self._model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(context.folder)
        ends = end_token_ids(context.folder, self._tokenizer)
        self._ends = torch.tensor(ends, device=context.device)
        self._forbidden = torch.tensor(list(context.forbidden_token_ids), dtype=torch.long, device=context.device)

    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        """See :class:`RolloutEngine`."""
        # A subclass may stream by this method, as the base class does.
        found = dict(ready for step in TransformersEngine.stream(self, prompts, n, sampling, seed) for ready in step)
        return [found[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """See :class:`RolloutEngine`. A prompt is yielded when its last response has ended."""
        copies = n if sampling.temperature == 0 else 1  # a greedy response is computed once
        rows = [
            Row(place, first + i, sampling.max_new_tokens - prompt.prefix_len)
            for place, (prompt, first) in enumerate(zip(prompts, prompt_seeds(seed, len(prompts)), strict=True))
            for i in range(n // copies)
        ]
        stop = StopStrings(self._tokenizer, sampling.stop)
        decoder = Decoder(self._model, prompts, sampling, self._ends, self._forbidden, self.batch_size, stop)
        finished: dict[int, list[Finished]] = {place: [] for place in range(len(prompts))}
        for found in decoder.run(rows):
            for each in found:
                finished[each.row.place].append(each)
            places = dict.fromkeys(each.row.place for each in found)
            ready = [place for place in places if len(finished[place]) * copies == n]
            yield [(place, self._responses(finished.pop(place) * copies, sampling)) for place in ready]

    def _responses(self, finished: list[Finished], sampling: Sampling) -> list[Response]:
        """Responses of one prompt, in the order of their seeds."""
        ordered = sorted(finished, key=lambda each: each.row.seed)
        sampled = [(each.token_ids, each.logps, each.reason) for each in ordered]
        own = [t for each in ordered if (t := sampling.temperature_of(each.row.seed)) is not None]
        return responses_of(self._tokenizer, sampled, sampling.stop, own)

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Copies every named tensor over the model's own."""
        own = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.version = version

    def stop(self) -> None:
        """Drops the model."""
        if hasattr(self, "_model"):
            del self._model
