"""A model's sizes from its configuration; the model is built without memory for its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.model.loading import auto_class, freeze_tower, layers, vision_tower
from popo_lightning.model.lora import Adapted, Lora, adapters, inject, target_layers

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # autocast keeps a bfloat16 copy of their weights


@dataclass(frozen=True)
class Architecture:
    """A model's sizes; tied parameters count once.

    Args:
        parameters: Number of parameters of the whole policy.
        trained: Number of parameters that get gradients.
        cast: Number of trained parameters in matrices, of which autocast keeps copies.
        critic: Number of parameters of a critic's base, which is the policy without its output head.
        critic_trained: Number of the critic's parameters that get gradients.
        critic_cast: Number of the critic's trained parameters in matrices.
        layer: Number of parameters of the largest layer.
        root: Number of parameters outside all layers.
        vocabulary: Rows of the output head.
        hidden: Width of the states that the head reads.
        feed_forward: Width inside a layer's feed-forward part.
        cache_elements: Keys and values of one token in all layers.
        vision: The vision tower; None without one.
        adapters: Number of the policy's parameters that are in adapters.
        critic_adapters: Number of the critic's parameters that are in adapters.
        matrices: Number of parameters of the linear layers inside all layers, without adapters.
    """

    parameters: int
    trained: int
    cast: int
    critic: int
    critic_trained: int
    critic_cast: int
    layer: int
    root: int
    vocabulary: int
    hidden: int
    feed_forward: int
    cache_elements: int
    vision: Vision | None
    adapters: int = 0
    critic_adapters: int = 0
    matrices: int = 0


@dataclass(frozen=True)
class Vision:
    """A vision tower's widths.

    Args:
        depth: Number of layers.
        hidden: Width of a patch's state.
        feed_forward: Width inside a layer's feed-forward part.
        patches: Patches per image token.
        token_pixels: Pixels per image token.
        trained: Whether the tower is trained.
    """

    depth: int
    hidden: int
    feed_forward: int
    patches: int
    token_pixels: int
    trained: bool


def architecture(config: Any, freeze_vision: bool, name: str, lora: Lora | None = None) -> Architecture:
    """Builds a model on the meta device and counts its sizes.

    Args:
        config: transformers configuration.
        freeze_vision: Whether the vision tower is frozen.
        name: Name of the model, for messages.
        lora: Adapters; None without them.

    Raises:
        SettingError: No policy can be made from this configuration.
    """
    model = empty_model(config, name, torch.device("meta"), torch.float32)
    matrices: list[Any] = [
        module.weight for block in layers(model) for module in block.modules() if type(module) is nn.Linear
    ]
    tower = vision_tower(model)
    if freeze_vision:
        freeze_tower(model, name)
    if lora is not None:
        inject(model, Adapted(lora, adapted_layers(model, lora, name, freeze_vision), ""))
    text = config.get_text_config()
    head = model.get_output_embeddings()
    blocks = layers(model)
    sizes = [_count(block.parameters()) for block in blocks]
    in_matrices = {id(p) for module in model.modules() if isinstance(module, MATRICES) for p in module.parameters()}
    base = list(model.base_model.parameters())
    heads = text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Architecture(
        parameters=_count(model.parameters()),
        trained=_count(p for p in model.parameters() if p.requires_grad),
        cast=_count(p for p in model.parameters() if p.requires_grad and id(p) in in_matrices),
        critic=_count(base),
        critic_trained=_count(p for p in base if p.requires_grad),
        # the critic's embedding is tied to no head
        critic_cast=_count(p for p in base if p.requires_grad and id(p) in in_matrices and p is not head.weight),
        layer=max(sizes, default=0),
        root=_count(model.parameters()) - sum(sizes),
        vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1],
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        cache_elements=2 * text.num_hidden_layers * key_value_heads * width,
        vision=_vision(config.vision_config, tower) if tower is not None else None,
        adapters=_count(adapters(model).values()),
        critic_adapters=_count(adapters(model.base_model).values()),
        matrices=_count(matrices),
    )


def adapted_layers(model: Any, lora: Lora, name: str, freeze_vision: bool) -> list[str]:
    """Names of a model's layers that get an adapter.

    Raises:
        SettingError: The model has no such layers.
    """
    tower = vision_tower(model)
    kept = {id(module) for module in tower.modules()} if tower is not None and freeze_vision else set()
    return target_layers(model, lora, name, kept)


def empty_model(config: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model in training mode with arbitrary weights.

    Raises:
        SettingError: transformers cannot build the model, or it could not be trained here.
    """
    try:
        with device:
            model: Any = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        text = config.get_text_config()
        if (
            not hasattr(model.get_output_embeddings(), "weight")
            or min(text.num_attention_heads, len(layers(model))) < 1
        ):
            raise ValueError("it has no output head, no attention or no layer")
    except Exception as error:  # an inconsistent configuration may raise any exception
        raise SettingError(
            f"model.path is '{name}', of whose configuration no language model can be built: {reason(error)}"
        ) from error
    return model.train()


def _vision(config: Any, tower: nn.Module) -> Vision:
    hidden, merge = config.hidden_size, config.spatial_merge_size
    ratio = getattr(config, "mlp_ratio", None) or 4
    if hasattr(config, "embed_dim"):  # Qwen2-VL: hidden_size is the language model's
        hidden = config.embed_dim
    return Vision(
        depth=config.depth,
        hidden=hidden,
        feed_forward=getattr(config, "intermediate_size", None) or int(ratio * hidden),
        patches=merge**2,
        token_pixels=(config.patch_size * merge) ** 2,
        trained=any(p.requires_grad for p in tower.parameters()),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements; each parameter counts once."""
    return sum({id(p): p.numel() for p in parameters}.values())
