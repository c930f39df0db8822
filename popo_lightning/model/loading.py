"""Loads model folders, text or vision-language, for policy, engine and prompts."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # a name: nothing is unpickled here
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.model.attention import keep_graphs_whole, use_packed_attention
from popo_lightning.model.files import check_adapter
from popo_lightning.model.logit_form import logit_form
from popo_lightning.model.lora import Lora, adapt
from popo_lightning.model.packing import takes_packed_tokens

# Errors of transformers and safetensors for missing, unreadable or damaged files.
LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError)
# Settings of layers that pass a state from token to token.
STATES = ("mamba_d_state", "ssm_state_size", "state_size", "conv_L_cache", "linear_conv_kernel_dim", "block_types")
# Names of vision towers inside transformers' models.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


def load_model(folder: str | Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Loads a language model on the CPU, with its vision tower if it has one.

    Lightning enters a device context around ``configure_model``. transformers would take that context for a
    device_map, which needs accelerate, so the model loads on the CPU and the strategy moves it.

    Args:
        folder: Model folder or hub id.
        dtype: Type of the weights.
        attention: Implementation by transformers' name; None for its default.

    Raises:
        SettingError: No model loads from the folder.
    """
    from transformers import AutoConfig

    check_adapter(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if sees_images(config):
            check_vision(config, folder)
        attention = usable_attention(config, attention, folder)
        with torch.device("cpu"):
            model, found = auto_class(config).from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, attn_implementation=attention, output_loading_info=True
            )
    except SettingError:
        raise
    except LOADING_ERRORS as error:
        raise SettingError(f"model.path is '{folder}', from which no model loads: {reason(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise SettingError(
            f"model.path is '{folder}', whose weights lack {missing[0]} and {len(missing) - 1} more parameters of a "
            f"{type(model).__name__}, which would stay random; give a folder with all of its weights"
        )
    return model


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that makes a language model of a configuration, with its vision tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def usable_attention(config: Any, attention: str | None, folder: str | Path = "") -> str | None:
    """Returns an attention implementation that computes the model correctly, None for transformers' default.

    Args:
        config: Configuration of the model.
        attention: Requested implementation, or None.
        folder: Model folder, for the error message.

    Raises:
        SettingError: The requested implementation leaves out something that the model needs.
    """
    if not getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return attention
    if attention == "sdpa":
        raise SettingError(
            f"model.attention is sdpa, which leaves out the cap on attention scores that model.path '{folder}' "
            "has; set it to eager, or to null"
        )
    return attention or "eager"  # the default is sdpa


def family(folder: str | Path) -> str:
    """Returns the architecture in a model folder's configuration, such as Qwen3ForCausalLM; "model" without one."""
    config = config_of(folder)
    return str((getattr(config, "architectures", None) or ["model"])[0])


def passes_states(folder: str | Path) -> bool:
    """Returns whether some of a model's layers pass a state from token to token, with or without attention."""
    config = config_of(folder)
    if config is None:
        return False
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    others = [kind for kind in kinds if "attention" not in kind or "linear" in kind]
    return bool(others) or any(getattr(text, name, None) for name in STATES)


def config_of(folder: str | Path) -> Any:
    """Returns a model folder's configuration, or None. Loading the model later gives the reason."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # a damaged file may raise anything
        return None


def load_trainable(
    folder: str | Path,
    dtype: torch.dtype,
    freeze_vision: bool,
    attention: str | None = None,
    lora: Lora | None = None,
) -> Any:
    """Loads a model to train: without dropout, and optionally with a frozen vision tower or with adapters.

    Args:
        folder: Model folder or hub id.
        dtype: Type of the weights.
        freeze_vision: Train the language model only.
        attention: Implementation by transformers' name; None takes that of packed tokens if it is exact.
        lora: Settings of adapters, which are then the only trained weights.

    Raises:
        SettingError: No model loads from the folder, or its log-probs or images would be computed wrongly.
    """
    return made_trainable(load_model(folder, dtype, attention), folder, freeze_vision, attention, lora)


def made_trainable(
    model: Any,
    folder: str | Path,
    freeze_vision: bool,
    attention: str | None = None,
    lora: Lora | None = None,
) -> Any:
    """Prepares a loaded model for training, see :func:`load_trainable`.

    Args:
        model: A transformers model.
        folder: Model folder, for error messages.
        freeze_vision: Train the language model only.
        attention: Implementation it was loaded with, by transformers' name; None takes that of packed tokens if it is
            exact.
        lora: Settings of adapters, which are then the only trained weights.
    """
    if attention is None and takes_packed_tokens(model):
        use_packed_attention(model)
    elif attention == "flex_attention":  # compiled by transformers
        keep_graphs_whole()
    if (form := logit_form(model)) is None:
        raise SettingError(
            f"model.path is '{folder}', a {type(model).__name__}, whose logits are no scaled or capped outputs of a "
            "linear head; log-probs are computed from hidden states and would be wrong, so choose a model of another "
            "family"
        )
    model.logit_form = form
    remove_dropout(model)
    if freeze_vision:
        freeze_tower(model, folder)
    return model if lora is None else adapt(model, lora, folder, freeze_vision, vision_tower(model))


def compile_layers(model: Any) -> None:
    """Compiles each of a model's layers, for passes of any shape. On a CPU this needs a C++ compiler."""
    keep_graphs_whole()
    for layer in layers(model):
        layer.compile(dynamic=True)


def layers(model: Any) -> list[nn.Module]:
    """Returns the layers of a model's decoder and vision tower, by transformers' class names."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def remove_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, because with dropout the ratio would differ from 1 on unchanged weights."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # layers pass it to functions
                setattr(module, name, 0.0)


def settle_modes(model: nn.Module, checkpointing: bool) -> None:
    """Puts a model in eval mode. With checkpointing, it and modules that recompute activations stay in training mode.

    transformers recomputes only in training mode, but there routers of experts draw noise.
    """
    model.eval()
    for module in model.modules() if checkpointing else ():
        module.training = module is model or hasattr(module, "gradient_checkpointing")


def sees_images(config: Any) -> bool:
    """Returns whether a model configuration has a vision tower."""
    return getattr(config, "vision_config", None) is not None


def check_vision(config: Any, folder: str | Path) -> None:
    """Raises SettingError for a vision tower that is not built like Qwen-VL's."""
    fields = ("spatial_merge_size", "temporal_patch_size", "patch_size")
    if not all(hasattr(config.vision_config, field) for field in fields):
        raise SettingError(
            f"model.path is '{folder}', a vision-language model of type {config.model_type}; those that work are "
            "Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
        )


def image_tokens(config: Any) -> list[int]:
    """Returns the tokens that stand for image features. A response must not contain any, as it has no features."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index")
    return sorted({token for name in names if isinstance(token := getattr(config, name, None), int)})


def vision_tower(model: nn.Module) -> nn.Module | None:
    """Returns the part of a model that encodes images, or None."""
    base = getattr(model, "base_model", model)
    for name in VISION_TOWERS:
        if isinstance(tower := getattr(base, name, None), nn.Module):
            return tower
    return None


def freeze_tower(model: nn.Module, folder: str | Path) -> None:
    """Takes a model's vision tower out of training; raises SettingError if the model of the folder has none."""
    tower = vision_tower(model)
    if tower is None:
        raise SettingError(f"model.freeze_vision is true but model.path '{folder}' has no vision tower; leave it out")
    tower.requires_grad_(False)


def mm_token_type_ids(config: Any, input_ids: Tensor) -> Tensor:
    """Returns (R, L) 1 at image tokens and 0 elsewhere. transformers 5 computes positions from it."""
    return (input_ids == config.image_token_id).int()


def zero_through_vision_tower(model: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Computes zero through the vision tower, so that DDP and other ranks do not wait for a rank without an image."""
    blank = blank_image(model.config, device, dtype)
    # The pooler's output has passed the whole tower; the hidden states stop before its merger. Qwen3-VL also gives
    # features of inner layers.
    seen: Any = vision_tower(model)(blank["pixel_values"], grid_thw=blank["image_grid_thw"])  # type: ignore[misc]
    outputs: list[Tensor] = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]
    return torch.stack([output.sum() for output in outputs]).sum() * 0


def blank_image(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the smallest image that a Qwen-VL tower takes, in its own input format."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.zeros(side * side, patch, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, side, side]], device=device),
    }
