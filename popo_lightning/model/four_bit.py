"""Frozen matrices in 4 bits, by bitsandbytes (QLoRA, 2305.14314)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from popo_lightning.model.loading import layers


def quantize(model: Any) -> None:
    """Replaces the linear layers inside a model's layers by NF4 layers, in place.

    bitsandbytes quantizes the weights when the model is moved to its device.

    Args:
        model: A transformers model on the CPU. Its embeddings, norms and head do not change.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in layers(model):
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            made: Any = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=linear.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            made.bias = linear.bias
            # In evaluation mode some CPUs would pack the weights as bfloat16, which `dequantized` would misread.
            made.support_avx512bf16_for_cpu = False
            layer.set_submodule(name, made)
    model.is_loaded_in_4bit = True  # peft reads this


def dequantized(parameter: Any) -> Tensor:
    """Returns the values of a 4-bit matrix, in the dtype that it was quantized from.

    Args:
        parameter: Parameter made by :func:`quantize`, after the model has been moved to its device.
    """
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
    return found
