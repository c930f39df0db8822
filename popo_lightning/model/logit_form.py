"""What a model does to its logits after the linear head: some families scale them, or cap them smoothly.

Log-probs are computed from hidden states and the head, chunk by chunk, so they have to repeat it. Settings of the same
name multiply in one family and divide in another. So each form that a configuration may mean is tried, and the one that
gives the model's own logits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of configurations: what logits, or the states before the head, are multiplied or divided by.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
PROBED = 3  # states; their logits are of the head alone


@dataclass(frozen=True)
class LogitForm:
    """From a linear head's outputs to logits: ``cap * tanh(scale * output / cap)``, or only scaling without a cap.

    Args:
        scale: Factor of the outputs.
        cap: Bound of the logits; None applies no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    def of(self, outputs: Tensor) -> Tensor:
        """Logits of (..., V) outputs of the head."""
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
    """The form of a model's logits, or None where no form gives them from its hidden states.

    Args:
        model: A causal language model of transformers on the CPU, with its weights.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    with torch.device("cpu"):  # where the model is, in every device context
        states, own = _probe(model, head)
        outputs = head(states).float()
        close = 1e-4 if states.dtype == torch.float32 else 3e-2
        for form in _forms(model.config.get_text_config()):
            found = form.of(outputs)
            if found.shape == own.shape and float((found - own).abs().max()) <= close * float(own.abs().max()):
                return form
    return None


def _forms(config: Any) -> Iterator[LogitForm]:
    """All that a configuration may mean."""
    caps, values = (
        [v for n in names if isinstance(v := getattr(config, n, None), float | int) and v] for names in (CAPS, SCALES)
    )
    for cap in (None, *map(float, caps)):
        for scale in (1.0, *values, *(1 / value for value in values)):
            yield LogitForm(float(scale), cap)


def _probe(model: Any, head: nn.Module) -> tuple[Tensor, Tensor]:
    """((1, 3, H) states, (1, 3, V) float32 logits that the model makes of them).

    The base model is left out, since its layers may be large. A model that gets by its forward is asked in earnest.
    """
    base, asked = model.base_model, []
    weight: Any = head.weight
    generator = torch.Generator().manual_seed(0)
    # so large that a cap bends them
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
        asked.clear()  # it needs more of its base model than states
    finally:
        del base.forward
    if not asked:
        states = base(input_ids=ids, use_cache=False).last_hidden_state
        own = model(input_ids=ids, use_cache=False).logits
    return states, own.float()
