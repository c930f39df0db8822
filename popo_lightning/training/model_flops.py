"""Floating-point operations of training on a row of tokens, counted by the usual convention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.loading import VISION_TOWERS

WINDOWED = ("sliding_attention", "chunked_attention")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of the number of experts in transformers


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a language model's forward and backward passes.

    A token of a row of L tokens takes 6 operations for each parameter that multiplies it, and 12 x width x L for the
    attention of each layer (2204.02311, appendix B). This is a convention: the causal half of attention is not
    subtracted, the head counts at every token, and recomputation and shared prompts make no difference. Input
    embeddings and a vision tower do not count; of a mixture of experts, only a token's active experts count.

    Args:
        parameters: Number of parameters that multiply a token: all but the input embedding, with the head. A frozen
            one, which has no gradient, counts as two thirds.
        layers: Number of layers that attend to all earlier tokens.
        windowed_layers: Number of layers that attend to the last `window` tokens.
        window: Window in tokens; 0 without windowed layers.
        width: Width of a layer's attention: heads x head size, as the mean over keys and values.
    """

    parameters: float
    layers: int
    windowed_layers: int
    window: int
    width: float

    @classmethod
    def of_model(
        cls, config: Any, shapes: Mapping[str, Sequence[int]], frozen: Collection[str] = ()
    ) -> ModelFlops | None:
        """Returns the counts of a model; None if its configuration lacks the width or number of layers.

        Args:
            config: Configuration of a transformers model.
            shapes: Shapes of the whole parameters by name, tied ones once.
            frozen: Names of the parameters that are not trained.
        """
        text = config.get_text_config()
        sizes: list[Any] = [
            getattr(text, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        ]
        if not all(isinstance(size, int) for size in sizes):
            return None
        hidden, heads, layers = sizes
        keys = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None) or hidden // heads
        values = getattr(text, "v_head_dim", None) or keys
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
        windowed = sum(kinds.count(kind) for kind in WINDOWED)
        window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
        return cls(
            parameters=_multiplying(text, shapes)
            - _multiplying(text, {n: shapes[n] for n in shapes if n in frozen}) / 3,
            layers=kinds.count("full_attention"),
            windowed_layers=windowed,
            window=window,
            width=heads * (keys + values) / 2,
        )

    def of_row(self, length: int) -> float:
        """Returns the operations of a row with this many prompt and response tokens."""
        seen = self.layers * length + self.windowed_layers * min(length, self.window)
        return (6 * self.parameters + 12 * self.width * seen) * length

    def of_minibatch(self, minibatch: Minibatch) -> float:
        """Returns the operations of all rows, each with its own prompt."""
        return sum(self.of_row(length) for length in row_lengths(minibatch))


def row_lengths(minibatch: Minibatch) -> list[int]:
    """Returns the number of prompt and response tokens of each row."""
    return [
        len(group.prompt_ids) + len(response.token_ids) for group in minibatch.groups for response in group.responses
    ]


def _multiplying(text: Any, shapes: Mapping[str, Sequence[int]]) -> float:
    """Returns the number of parameters that multiply a token."""
    of_text = {name: shape for name, shape in shapes.items() if not {*name.split(".")} & {*VISION_TOWERS}}
    number = next((found for name in EXPERTS if (found := getattr(text, name, None))), 1)
    share = getattr(text, "num_experts_per_tok", None) or number
    total = sum(prod(shape) * (share / number if ".experts." in name else 1.0) for name, shape in of_text.items())
    tables = [
        shape for shape in of_text.values() if list(shape[1:]) == [text.hidden_size] and shape[0] == text.vocab_size
    ]
    # Of two tables, one is the input embedding; a single table is also the head.
    return total - (prod(tables[0]) if len(tables) > 1 else 0)
