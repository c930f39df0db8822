"""A model's transformation of its head's outputs to logits: some families scale them, or cap them smoothly.

Log-probs are computed from hidden states and the head, chunk by chunk, so they must repeat the transformation. A
setting of the same name multiplies in one family and divides in another. So each form that a configuration may mean is
tried, and the one that gives the model's own logits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Settings in configurations by which logits, or the states before the head, are multiplied or divided.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
PROBED = 3  # number of states in the trial


@dataclass(frozen=True)
class LogitForm:
    """Maps a linear head's outputs to logits: ``cap * tanh(scale * output / cap)``, or only scaling without a cap.

    Args:
        scale: Factor of the outputs.
        cap: Bound of the logits; None applies no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    def of(self, outputs: Tensor) -> Tensor:
        """Returns the logits of (..., V) outputs of the head."""
        if self.scale != 1:
            outputs = outputs * self.scale
        return outputs if self.cap is None else (outputs / self.cap).tanh() * self.cap


PLAIN = LogitForm()


class _States(tuple[Tensor]):
    """Replaces a base model's output: it has the states, and nothing else that a head might need."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def logit_form(model: Any) -> LogitForm | None:
    """Finds the form of a model's logits; None if no form gives them from its hidden states.

    Args:
        model: A causal language model of transformers on the CPU, with its weights.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    with torch.device("cpu"):  # the model is on the CPU, whatever the device context
        states, own = _probe(model, head)
        outputs = head(states).float()
        close = 1e-4 if states.dtype == torch.float32 else 3e-2
        for form in _forms(model.config.get_text_config()):
            found = form.of(outputs)
            if found.shape == own.shape and float((found - own).abs().max()) <= close * float(own.abs().max()):
                return form
    return None


def _forms(config: Any) -> Iterator[LogitForm]:
    """Yields all forms that a configuration may mean."""
    caps, values = (
        [v for n in names if isinstance(v := getattr(config, n, None), float | int) and v] for names in (CAPS, SCALES)
    )
    for cap in (None, *map(float, caps)):
        for scale in (1.0, *values, *(1 / value for value in values)):
            yield LogitForm(float(scale), cap)


def _probe(model: Any, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns (1, 3, H) states and the (1, 3, V) float32 logits that the model computes from them.

    The base model is replaced, because its layers may be large. If the model does not call the replacement, or fails
    with it, the whole model runs.
    """
    base, asked = model.base_model, []
    weight: Any = head.weight
    generator = torch.Generator().manual_seed(0)
    # The states are so large that a cap changes the logits.
    states = 8 * torch.randn(1, PROBED, weight.shape[1], generator=generator) / weight.float().norm(dim=1).mean()
    states = states.to(weight.dtype)

    def given(*args: Any, **kwargs: Any) -> _States:
        asked.append(1)
        return _States((states,))

    ids = torch.arange(PROBED)[None] % weight.shape[0]
    base.forward = given
    try:
        own = model(input_ids=ids, use_cache=False).logits
    except Exception:
        asked.clear()  # the model needs more than states from its base model
    finally:
        del base.forward
    if not asked:
        states = base(input_ids=ids, use_cache=False).last_hidden_state
        own = model(input_ids=ids, use_cache=False).logits
    return states, own.float()
