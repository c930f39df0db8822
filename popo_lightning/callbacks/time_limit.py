"""Ends training after trainer.max_time, at the end of an iteration."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from popo_lightning.core.errors import SettingError


class TimeLimit(Timer):
    """Ends training after the iteration in which this process has trained for so long.

    Lightning's own keeps counting where a checkpoint's run stopped: a chain of jobs, or a new run from a checkpoint,
    would find its time used up and train nothing.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing from a checkpoint."""


def at_the_end_of_an_iteration(limit: Any) -> Timer:
    """Makes trainer.max_time a callback: Lightning's own would end a run in the middle of an iteration.

    Raises:
        SettingError: The limit is not a positive time.
    """
    try:
        timer = TimeLimit(limit, interval="epoch")
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise SettingError(
            f"trainer.max_time is '{limit}', which is no time; write DD:HH:MM:SS, such as 00:12:00:00"
        ) from error
    if not (timer._duration or 0) > 0:
        raise SettingError(f"trainer.max_time is '{limit}', no time at all; write DD:HH:MM:SS, such as 00:12:00:00")
    return timer
