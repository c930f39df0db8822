"""A checkpoint's record of its model, by which a checkpoint of another model is recognized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from popo_lightning.core.errors import SettingError
from popo_lightning.model.lora import DESCRIBED

SHAPES, FROZEN = "policy_shapes", "policy_frozen"
LORA = "policy_lora"  # settings and layers of adapters, and the fingerprint of the frozen weights
REVISION = "policy_revision"  # hub commit of the model that the run began with
FOLDER = "policy_folder"  # absolute path of that model if it is a folder
HEAD = "policy_critic_head"  # settings that shapes do not show
CRITIC, TARGET = "value_model.", "value_target."


def describe(model: nn.Module) -> dict[str, Any]:
    """Returns shapes, adapters, a critic's head and frozen names. Call it before a strategy changes parameters."""
    parameters = dict(model.named_parameters())
    adapted = getattr(model.model, "adapted", None)
    return {
        HEAD: _head(getattr(model, "critic", None)),
        LORA: None if adapted is None else adapted.described(),
        SHAPES: {name: list(parameter.shape) for name, parameter in parameters.items()},
        FROZEN: sorted(name for name, parameter in parameters.items() if not parameter.requires_grad),
    }


def origin(path: str | None) -> dict[str, str | None]:
    """Where the model that the run began with comes from: a folder, or the hub's commit of the cached files.

    Args:
        path: model.path.
    """
    folder = str(Path(path).absolute()) if path is not None and Path(path).exists() else None
    revision = None
    if path is not None and folder is None and path.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
        revision = Path(found).parent.name if isinstance(found, str) else None
    return {REVISION: revision, FOLDER: folder}


def check(own: dict[str, Any], checkpoint: dict[str, Any], path: str, training: bool, freeze_vision: bool) -> None:
    """Raises SettingError for a checkpoint of another model, or, in training, of other trained parameters.

    Args:
        own: :func:`describe` of this run's model.
        checkpoint: Checkpoint, which has the description of its model.
        path: Path of this run's model.
        training: Whether the run continues training.
        freeze_vision: Value of model.freeze_vision.
    """
    check_lora(own.get(LORA), checkpoint.get(LORA), path)
    saved, shapes = checkpoint.get(SHAPES), own[SHAPES]
    if saved is not None and saved != shapes:
        _check_critic(saved, shapes)
        different = sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name))
        raise SettingError(
            f"the checkpoint holds another model than model.path ({path}): {different[0]} is "
            f"{saved.get(different[0], 'missing')} there and {shapes.get(different[0], 'missing')} here; resume with "
            "the model it was trained from"
        )
    _check_head(own.get(HEAD), checkpoint.get(HEAD))
    frozen = checkpoint.get(FROZEN, [])
    if training and frozen != own[FROZEN]:
        raise SettingError(
            f"model.freeze_vision is {str(freeze_vision).lower()}, but the checkpoint's optimizer has "
            f"{'fewer' if frozen else 'more'} parameters; resume with the setting it was trained with"
        )


def check_lora(own: dict[str, Any] | None, saved: dict[str, Any] | None, path: str) -> None:
    """Raises SettingError if adapters or frozen weights differ from the checkpoint's.

    Args:
        own: LORA entry of this run's :func:`describe`.
        saved: LORA entry of the checkpoint.
        path: Path of this run's model.
    """
    if own is None or saved is None:
        if (own is None) != (saved is None):
            raise SettingError(
                f"model.lora is {'null' if own is None else 'set'}, but the checkpoint holds "
                f"{'adapters alone' if own is None else 'all weights'}; resume with the model.lora it was trained with"
            )
        return
    for name in DESCRIBED:
        if own[name] != saved[name]:
            raise SettingError(
                f"model.lora.{name} is {own[name]}, but the checkpoint's adapters were trained with {saved[name]}; "
                "resume with the same"
            )
    if own["targets"] != saved["targets"]:
        other = sorted({*own["targets"]} ^ {*saved["targets"]})[0]
        raise SettingError(
            f"model.lora.target_modules gives {len(own['targets'])} layers an adapter, but the checkpoint has "
            f"{len(saved['targets'])}, and {other} is in one of the two alone; resume with the same"
        )
    if own["base"] != saved["base"]:
        raise SettingError(
            f"the checkpoint's adapters belong to other weights than those of model.path ({path}): their fingerprints "
            f"are {saved['base']} and {own['base']}; give the model, its revision and the model.dtype that the run "
            "began with"
        )


def _check_critic(saved: dict[str, Any], own: dict[str, Any]) -> None:
    there, here = (any(name.startswith(CRITIC) for name in shapes) for shapes in (saved, own))
    if there != here:
        raise SettingError(
            f"model.critic is {'set' if here else 'null'}, but the checkpoint {'has' if there else 'lacks'} a value "
            "model; use a method with the same model.critic as in that run"
        )
    for setting, prefixes in {"head or heads": (CRITIC + "head.", CRITIC + "delta."), "target": (TARGET,)}.items():
        forms = [{n: shape for n, shape in each.items() if n.startswith(prefixes)} for each in (saved, own)]
        if forms[0].keys() != forms[1].keys() or (setting != "target" and _rows(forms[0]) != _rows(forms[1])):
            raise SettingError(
                f"model.critic differs from that of the checkpoint by its {setting}; use the model.critic of that run"
            )


def _head(critic: Any) -> dict[str, Any] | None:
    """Returns the settings that give a critic head's outputs their meaning; None without a critic."""
    if critic is None:
        return None
    settings = {name: getattr(critic.head, name, None) for name in ("field", "low", "high")}
    return {"class": type(critic.head).__name__, "groups": list(critic.head.groups)} | settings


def _check_head(own: dict[str, Any] | None, saved: dict[str, Any] | None) -> None:
    if own is None or saved is None:  # an earlier version did not record it
        return
    for name in own:
        if own[name] != saved.get(name):
            raise SettingError(
                f"model.critic.head has {name} {own[name]}, but the checkpoint's {saved.get(name)}; use the "
                "model.critic of that run"
            )


def _rows(shapes: dict[str, Any]) -> dict[str, int]:
    """Returns the number of outputs of each linear layer by name, which does not depend on the model."""
    return {name: shape[0] for name, shape in shapes.items()}
