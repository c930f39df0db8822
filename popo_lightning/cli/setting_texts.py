"""Refuses names and empty values that the parser accepts but a run cannot use."""

from __future__ import annotations

import inspect
from string import Formatter
from typing import Any

from popo_lightning.core.did_you_mean import object_at
from popo_lightning.core.errors import SettingError

LONGEST = 100  # bytes of a folder's name, before seed and number are added
# Slots that every run fills, and the default class of each.
FILLED = {
    "proximal": "popo_lightning.proximal.snapshot.ProximalSnapshot",
    "parameter_hook": "popo_lightning.proximal.parameter_hook.ParameterHook",
}


def check_texts(config: Any) -> None:
    """Raises SettingError for texts that cannot name a folder.

    Args:
        config: Settings as parsed.
    """
    for name in ("run.root", "run.folder", "ckpt_path", "checkpoint.dirpath"):
        if config.get(name) == "":
            raise SettingError(f"{name} is empty, which names no place; leave it out")
    for name in ("run.task", "run.method"):
        given = config[name]
        if not given.strip(".") or "/" in given or not given.isprintable():
            raise SettingError(f"{name} is {given!r}, which names no folder; use a plain name such as mine")
        if len(given.encode()) > LONGEST:
            raise SettingError(
                f"{name} is '{given[:20]}…', {len(given.encode())} bytes, and names a folder; use at most {LONGEST}"
            )


def check_checkpoints(kept: Any) -> None:
    """Raises SettingError for checkpoint intervals and names that Lightning would ignore, or refuse only when saving.

    Args:
        kept: Settings of class `checkpoint`.
    """
    for name in ("every_n_epochs", "every_n_train_steps"):
        if (number := kept[name]) is not None and number < 0:
            raise SettingError(f"checkpoint.{name} is {number}; use at least 1, or null for none")
    if kept.every_n_train_steps and kept.every_n_epochs:
        raise SettingError(
            f"checkpoint.every_n_train_steps is {kept.every_n_train_steps} beside checkpoint.every_n_epochs, "
            f"{kept.every_n_epochs}; set the second to null, or leave the first out"
        )
    if kept.train_time_interval is not None:
        raise SettingError(
            f"checkpoint.train_time_interval is {kept.train_time_interval}, which Lightning ignores under manual "
            "optimization; set checkpoint.every_n_epochs (iterations) instead"
        )
    if kept.mode not in ("min", "max"):
        raise SettingError(f"checkpoint.mode is '{kept.mode}'; use min or max")
    if kept.save_top_k < -1:
        raise SettingError(f"checkpoint.save_top_k is {kept.save_top_k}; use a number of checkpoints, or -1 for all")
    if kept.save_top_k > 1 and kept.monitor is None:
        raise SettingError(
            f"checkpoint.save_top_k is {kept.save_top_k}, but checkpoint.monitor is null, so that none is better than "
            "another; set checkpoint.monitor to a metric such as eval/NAME/greedy, or checkpoint.save_top_k to -1 "
            "(all), 0 (none) or 1 (the newest)"
        )
    _check_filename(kept.filename)


def _check_filename(name: str | None) -> None:
    if name is None:
        return
    try:
        for _, value, form, _ in Formatter().parse(name):
            if value is not None:
                format(1 if value in ("epoch", "step", "iteration", "minibatch") else 0.5, form or "")
    except ValueError as error:
        raise SettingError(
            f"checkpoint.filename is '{name}', which no name can be made of ({error}); write values as "
            "{iteration} or {step:06d}"
        ) from error
    if not name or "/" in name:
        raise SettingError(
            f"checkpoint.filename is '{name}', which is no name of a file; write one such as "
            "{iteration}-{step}, and the folder as checkpoint.dirpath"
        )


def check_slots(config: Any) -> None:
    """Raises SettingError for null where a class or an argument of one is required.

    Args:
        config: Settings as parsed.
    """
    for name, nothing in FILLED.items():
        if config.get(name, nothing) is None:
            raise SettingError(f"{name} is null, but every run has one; leave it out, which is {nothing}")
    for name in ("optimizer", "lr_scheduler"):
        slot = config.model.get(name)
        given = (slot.get("init_args") or {}) if slot is not None else {}
        defaults = _defaults(slot.class_path) if given else {}
        for argument in (one for one in dict(given) if given[one] is None):
            default = defaults.get(argument)
            if default is not None:
                instead = "give it" if default is inspect.Parameter.empty else f"leave it out, which is {default}"
                raise SettingError(f"model.{name}.{argument} is null, where a value belongs; {instead}")


def _defaults(path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(object_at(path)).parameters
    except (TypeError, ValueError):  # some classes of C extensions have no signature
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}
