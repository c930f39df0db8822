"""What a checkpoint records about its model, so that one of another model is recognized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from popo_lightning.core.errors import SettingError

SHAPES, FROZEN = "policy_shapes", "policy_frozen"
REVISION = "policy_revision"  # commit on the hub of the model that the run began with
CRITIC = "value_model."


def describe(model: nn.Module) -> dict[str, Any]:
    """Shapes by name and what is not trained, before any strategy splits or renames parameters."""
    parameters = dict(model.named_parameters())
    return {
        SHAPES: {name: list(parameter.shape) for name, parameter in parameters.items()},
        FROZEN: sorted(name for name, parameter in parameters.items() if not parameter.requires_grad),
    }


def revision(path: str | None) -> str | None:
    """Commit on the hub of the cached files that a model loads from; None for a folder.

    Args:
        path: model.path.
    """
    if path is None or Path(path).exists() or path.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def check(own: dict[str, Any], checkpoint: dict[str, Any], path: str, training: bool, freeze_vision: bool) -> None:
    """Raises SettingError for a checkpoint of another model, or, to train, of other trained parameters.

    Args:
        own: The :func:`describe` of this run's model.
        checkpoint: Which holds another's.
        path: Of this run's model.
        training: Whether the run continues training.
        freeze_vision: The setting.
    """
    saved, shapes = checkpoint.get(SHAPES), own[SHAPES]
    if saved is not None and saved != shapes:
        _check_critic(saved, shapes)
        different = sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name))
        raise SettingError(
            f"the checkpoint holds another model than model.path ({path}): {different[0]} is "
            f"{saved.get(different[0], 'missing')} there and {shapes.get(different[0], 'missing')} here; resume with "
            "the model it was trained from"
        )
    frozen = checkpoint.get(FROZEN, [])
    if training and frozen != own[FROZEN]:
        raise SettingError(
            f"model.freeze_vision is {str(freeze_vision).lower()}, but the checkpoint's optimizer has "
            f"{'fewer' if frozen else 'more'} parameters; resume with the setting it was trained with"
        )


def _check_critic(saved: dict[str, Any], own: dict[str, Any]) -> None:
    there, here = (any(name.startswith(CRITIC) for name in shapes) for shapes in (saved, own))
    if there != here:
        raise SettingError(
            f"model.critic is {'set' if here else 'null'}, but the checkpoint {'has' if there else 'lacks'} a value "
            "model; use a method with the same model.critic as in that run"
        )
