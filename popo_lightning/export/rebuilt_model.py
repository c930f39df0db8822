"""A model of transformers out of a configuration and weights, without those that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import sees_images, usable_attention

MOST_FLOAT16 = torch.finfo(torch.float16).max


def rebuilt(config: Any, weights: Mapping[str, Tensor], attention: str | None = None) -> Any:
    """A model that has given tensors as its weights, not copies of them.

    Args:
        config: Of a language model, with or without a vision tower.
        weights: All of them, by parameter name; tied ones may be missing.
        attention: Implementation by transformers' name; None for its default.

    Raises:
        SettingError: They are the weights of another model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    kind: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    chosen = usable_attention(config, attention)
    with no_init_weights(), torch.device("cpu"):  # memory that is never written to is never taken
        model = kind.from_config(config, attn_implementation=chosen, trust_remote_code=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys or {})
    try:
        found = model.load_state_dict(dict(weights), strict=False, assign=True)
    except RuntimeError as error:
        raise _another(str(error).splitlines()[-1].strip()) from error
    if odd := [name for name in (*found.missing_keys, *found.unexpected_keys) if name not in tied]:
        raise _another(f"{odd[0]} is in one of the two alone")
    model.tie_weights()
    return model.eval()


def cast(model: Any, dtype: torch.dtype) -> None:
    """Gives the weights another type, one at a time, but for those that the model keeps in float32.

    Args:
        model: Of transformers.
        dtype: The type.

    Raises:
        SettingError: A weight is too large for it.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            continue
        if dtype is torch.float16 and parameter.numel() and float(parameter.detach().abs().max()) > MOST_FLOAT16:
            raise SettingError(
                f"--dtype is float16, which ends at {MOST_FLOAT16:g}, but {name} has a larger weight; use bfloat16"
            )
        parameter.data = parameter.data.to(dtype)


def size_of(model: Any) -> int:
    """Bytes of a model's weights, tied ones counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _another(why: str) -> SettingError:
    return SettingError(
        f"the checkpoint holds another model than the one that its run began with ({why}); name that by --base"
    )
