"""Makes a PolicyModule from a checkpoint alone, for PolicyModule.load_from_checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from popo_lightning.cli.export.adapted_policy import adapted_model, has_adapters
from popo_lightning.cli.export.base_model import BaseModel, base_model, gone, of_warm_start, weights_folder
from popo_lightning.cli.export.built_classes import arguments_built
from popo_lightning.cli.export.rebuilt_model import cast, rebuilt
from popo_lightning.cli.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.cli.export.weights import weights_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model.loading import load_trainable, made_trainable
from popo_lightning.model.policy_checkpoint import CRITIC, TARGET
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.runs.checksums import damaged

if TYPE_CHECKING:
    from popo_lightning.policy import PolicyModule

    Policy = TypeVar("Policy", bound=PolicyModule)


def loaded_policy(kind: type[Policy], checkpoint: str | Path, given: Mapping[str, Any]) -> Policy:
    """Makes a policy with a checkpoint's weights and its run's settings, except for those that are given.

    The model that the run began with gives only its configuration: a warm start is not built again, and its weights are
    not read, unless the checkpoint holds only adapters or the method compares with that model as a reference policy.

    Args:
        kind: Class of the module.
        checkpoint: A file, a folder of shards, or a run's folder, whose newest checkpoint counts.
        given: Arguments of the module that replace the run's settings.

    Raises:
        SettingError: There is no such checkpoint, or it lacks what the module needs.
    """
    saved = saved_policy(str(checkpoint))
    module = kind(**_arguments(kind, saved, given))
    began = _base_of(module, saved)
    check_kind(module, saved)
    module._take(_whole(module, saved, began) if module.lora is None else _adapted(module, saved, began))
    if module._reference:
        module._reference = [_reference(module, began)]
    if module.critic is not None:
        _load_critic(module, saved)
    module.restored = True
    return module


def check_kind(module: PolicyModel, saved: SavedPolicy) -> None:
    """Raises SettingError if only one of module and checkpoint has adapters."""
    if has_adapters(saved) != (module.lora is not None):
        raise SettingError(
            f"lora is {'set' if module.lora is not None else 'None'}, but the checkpoint '{saved.checkpoint}' holds "
            f"{'adapters alone' if has_adapters(saved) else 'all weights'}; leave the argument out"
        )


def _whole(module: PolicyModel, saved: SavedPolicy, began: BaseModel | None) -> Any:
    """The model, rebuilt from all its weights."""
    config = _warm_start(module).config() if began is None else began.config()
    weights = {name: weight.clone() for name, weight in weights_of(saved).items()}
    model = rebuilt(config, weights, module.attention, module.weight_dtype)
    cast(model, module.weight_dtype)  # of the weights alone: rotary frequencies stay float32, as in the run
    if began is not None:
        model.generation_config = began.generation_config(config)
    folder = saved.checkpoint if began is None else began.address
    return made_trainable(model, folder, module.freeze_vision, module.attention)


def _adapted(module: PolicyModel, saved: SavedPolicy, began: BaseModel | None) -> Any:
    """The base with the checkpoint's adapters beside it."""
    if began is None:
        raise gone(_warm_start(module), f"and the checkpoint '{saved.checkpoint}' holds adapters of it alone")
    return adapted_model(saved, began, module)


def _arguments(kind: type[Any], saved: SavedPolicy, given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(saved.setting("model", {}))
    found["temperature"] = saved.setting("data.temperature", 1.0)
    if {"path", "warm_start"} & given.keys():
        found |= {"path": None, "warm_start": None}
    found = {name: value for name, value in found.items() if name not in given}
    return arguments_built(kind, found, "model") | dict(given)


def _base_of(module: PolicyModel, saved: SavedPolicy) -> BaseModel | None:
    """The model that the run began with; None for a warm start without its folder but with a known configuration."""
    if module.path is not None:
        return base_model(saved, module.path if module.path != saved.setting("model.path") else None)
    start = _warm_start(module)
    found = of_warm_start(start)
    if found is None and not start.knows_config:
        raise gone(start, "which has its configuration")
    return found


def _warm_start(module: PolicyModel) -> WarmStart:
    assert module.warm_start is not None
    return module.warm_start


def _reference(module: PolicyModel, began: BaseModel | None) -> Any:
    if began is None:
        raise gone(_warm_start(module), "and model.regularizers compares with it", ", or give other regularizers")
    model = load_trainable(weights_folder(began), module.weight_dtype, module.freeze_vision, module.attention)
    return model.requires_grad_(False)


def _load_critic(module: PolicyModel, saved: SavedPolicy) -> None:
    weights = weights_of(saved, CRITIC)
    if not weights:
        raise SettingError(
            f"model.critic is set, but the checkpoint '{saved.checkpoint}' has no value model; give critic=None and an "
            "advantage without one"
        )
    trained = {name for name, parameter in module.value_model.named_parameters() if parameter.requires_grad}
    _take_weights(module.value_model, weights, trained, module, saved)
    if module.value_target is not None:
        _take_weights(module.value_target, weights_of(saved, TARGET), module.value_target.saved, module, saved)


def _take_weights(
    part: nn.Module, weights: dict[str, Tensor], needed: set[str], module: PolicyModel, saved: SavedPolicy
) -> None:
    found = part.load_state_dict(weights, strict=module.lora is None)
    if odd := [*found.unexpected_keys, *(needed & {*found.missing_keys})]:
        raise damaged(saved.checkpoint, f"{odd[0]} of its value model has no match")
