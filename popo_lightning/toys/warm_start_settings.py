"""Refuses settings with which no tiny policy can be built, or that exceed a test machine's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from popo_lightning.core.errors import SettingError

MIN_STEPS = 40  # minimum for a schedule with a warm-up
MAX = {
    "hidden_size": 8192,
    "layers": 256,
    "heads": 256,
    "intermediate_size": 65536,
    "vision_hidden_size": 8192,
    "vision_layers": 256,
    "batch_size": 65536,
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises SettingError for the first setting with which no policy can be built.

    Args:
        settings: Settings of model.warm_start, by name.
    """
    for name in ("right", "usual_mistake"):
        if not 0 <= settings.get(name, 0) <= 1:
            raise SettingError(f"model.warm_start.{name} is {settings[name]}; use a share from 0 to 1")
    for name, most in MAX.items():
        if not 1 <= settings.get(name, 1) <= most:
            raise SettingError(f"model.warm_start.{name} is {settings[name]}; use a number from 1 to {most}")
    if not 0 < settings["learning_rate"] < math.inf:
        raise SettingError(
            f"model.warm_start.learning_rate is {settings['learning_rate']}; use a number above 0, such as 0.002"
        )
    width, heads = settings["hidden_size"], settings.get("heads", 1)
    if width % heads or (width // heads) % 2:
        raise SettingError(
            f"model.warm_start.hidden_size is {width} and model.warm_start.heads {heads}; each head takes an even "
            "number of the width, so make the first a multiple of twice the second"
        )
    if settings["examples"] < MIN_STEPS * settings["batch_size"]:
        raise SettingError(
            f"model.warm_start.examples is {settings['examples']}, fewer than {MIN_STEPS} batches of "
            f"model.warm_start.batch_size ({settings['batch_size']}); raise the first or lower the second"
        )
