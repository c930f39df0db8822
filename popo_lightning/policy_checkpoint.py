"""What a checkpoint says about its model, so that one of another model is recognised."""

from __future__ import annotations

from typing import Any

from torch import nn

from popo_lightning.errors import SettingError

SHAPES, FROZEN = "policy_shapes", "policy_frozen"


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of all parameters by name, before any strategy splits or renames them."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def describe(model: Any, checkpoint: dict[str, Any]) -> None:
    """Notes the shapes and what is not trained."""
    checkpoint[SHAPES] = model.shapes
    checkpoint[FROZEN] = _frozen(model)


def check(model: Any, checkpoint: dict[str, Any], path: str, training: bool, freeze_vision: bool) -> None:
    """Raises SettingError for a checkpoint of another model, or, to train, of other trained parameters."""
    saved, own = checkpoint.get(SHAPES), model.shapes
    if saved is not None and saved != own:
        different = sorted(name for name in {*saved, *own} if saved.get(name) != own.get(name))
        raise SettingError(
            f"the checkpoint holds another model than model.path ({path}): {different[0]} is "
            f"{saved.get(different[0], 'missing')} there and {own.get(different[0], 'missing')} here; resume with "
            "the model it was trained from"
        )
    frozen = checkpoint.get(FROZEN, [])
    if training and frozen != _frozen(model):
        raise SettingError(
            f"model.freeze_vision is {str(freeze_vision).lower()}, but the checkpoint's optimizer has "
            f"{'fewer' if frozen else 'more'} parameters; resume with the setting it was trained with"
        )


def _frozen(model: nn.Module) -> list[str]:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return sorted(name.replace("_fsdp_wrapped_module.", "") for name in frozen)
