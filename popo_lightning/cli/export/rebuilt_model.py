"""Makes a transformers model from a configuration and weights, without the weights that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import auto_class, usable_attention

MAX_FLOAT16 = torch.finfo(torch.float16).max


def rebuilt(
    config: Any, weights: Mapping[str, Tensor], attention: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Makes a model that takes the given tensors as its weights, without copies.

    Args:
        config: Configuration of a language model, with or without a vision tower.
        weights: All weights by parameter name; tied ones may be missing.
        attention: Attention implementation by transformers' name; None for its default.
        dtype: Type for which transformers makes buffers; None for the type of the largest weight.

    Raises:
        SettingError: The weights are another model's.
    """
    from transformers.initialization import no_init_weights

    chosen = usable_attention(config, attention)
    dtype = dtype or max(weights.values(), key=Tensor.numel, default=torch.empty(0)).dtype
    with no_init_weights(), torch.device("cpu"):  # memory that is not written to is not taken
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=chosen, trust_remote_code=False)
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
    """Converts the weights one at a time, except those that the model keeps in float32.

    Args:
        model: Transformers model.
        dtype: Target dtype.

    Raises:
        SettingError: A weight is too large for the dtype.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            continue
        if dtype is torch.float16 and parameter.numel() and float(parameter.detach().abs().max()) > MAX_FLOAT16:
            raise SettingError(
                f"--dtype is float16, which ends at {MAX_FLOAT16:g}, but {name} has a larger weight; use bfloat16"
            )
        parameter.data = parameter.data.to(dtype)


def _another(why: str) -> SettingError:
    return SettingError(
        f"the checkpoint holds another model than the one that its run began with ({why}); name that by --base"
    )
