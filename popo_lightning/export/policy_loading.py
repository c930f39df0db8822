"""A PolicyModule out of a checkpoint alone: PolicyModule.load_from_checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from popo_lightning.core.errors import SettingError
from popo_lightning.export.base_model import BaseModel, base_model
from popo_lightning.export.built_classes import arguments_built
from popo_lightning.export.rebuilt_model import rebuilt
from popo_lightning.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.export.weights import CRITIC, weights_of
from popo_lightning.model.loading import load_trainable, made_trainable

if TYPE_CHECKING:
    from popo_lightning.policy import PolicyModule

    Policy = TypeVar("Policy", bound=PolicyModule)


def loaded_policy(kind: type[Policy], checkpoint: str | Path, given: Mapping[str, Any]) -> Policy:
    """A policy with the weights of a checkpoint and, but for those that are given, the settings of its run.

    The model that the run began with gives its configuration alone: a warm start is not run again, and no weights of it
    are read, unless the method compares with a reference policy, which is that model.

    Args:
        kind: Of the module.
        checkpoint: A file, a folder of shards, or a run's folder, whose newest checkpoint counts.
        given: Arguments of the module, which go before the run's settings.

    Raises:
        SettingError: There is no such checkpoint, or it does not say what it needs.
    """
    saved = saved_policy(str(checkpoint))
    module = kind(**_arguments(kind, saved, given))
    began = _base_of(module, saved)
    config = module.warm_start.config() if began is None and module.warm_start else _some(began).config()
    model = rebuilt(config, {name: weight.clone() for name, weight in weights_of(saved).items()}, module.attention)
    if began is not None:
        model.generation_config = began.generation_config(config)
    folder = saved.checkpoint if began is None else began.weights_at
    module._take(made_trainable(model.to(module.weight_dtype), folder, module.freeze_vision, module.attention))
    if module._reference:
        module._reference = [_reference(module, began)]
    if module.critic is not None:
        _load_critic(module, saved)
    module.restored = True
    return module


def _arguments(kind: type[Any], saved: SavedPolicy, given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(saved.setting("model", {}))
    found["temperature"] = saved.setting("data.temperature", 1.0)
    if {"path", "warm_start"} & given.keys():
        found |= {"path": None, "warm_start": None}
    found = {name: value for name, value in found.items() if name not in given}
    return arguments_built(kind, json.loads(json.dumps(found)), "model") | dict(given)


def _base_of(module: Any, saved: SavedPolicy) -> BaseModel | None:
    """The model that it began with; None for a warm start whose folder is gone and whose configuration is known."""
    if module.path is not None:
        return base_model(saved, module.path if module.path != saved.setting("model.path") else None)
    if module.warm_start.place().exists():
        return BaseModel(
            module.warm_start.name, module.warm_start.place(), module.warm_start.address.rpartition("-")[2], None
        )
    if not module.warm_start.knows_config:
        raise SettingError(
            f"the policy that model.warm_start of '{saved.checkpoint}' built is no longer in "
            f"'{module.warm_start.place()}', which has its configuration; set POPO_CACHE to the cache that has it"
        )
    return None


def _some(began: BaseModel | None) -> BaseModel:
    assert began is not None
    return began


def _reference(module: Any, began: BaseModel | None) -> Any:
    if began is None:
        raise SettingError(
            f"model.regularizers compares with the model that the run began with, which is no longer in "
            f"'{module.warm_start.place()}'; set POPO_CACHE to the cache that has it, or give other regularizers"
        )
    model = load_trainable(began.weights_at, module.weight_dtype, module.freeze_vision, module.attention)
    return model.requires_grad_(False)


def _load_critic(module: Any, saved: SavedPolicy) -> None:
    weights = weights_of(saved, CRITIC)
    if not weights:
        raise SettingError(
            f"model.critic is set, but the checkpoint '{saved.checkpoint}' has no value model; give critic=None and an "
            "advantage without one"
        )
    module.value_model.load_state_dict(weights)
