"""Every method's settings are read as ``popo fit`` reads them, before the first run begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from popo_lightning.cli.main import PopoCLI
from popo_lightning.cli.parser import CLI_SETTINGS, RaisingParser
from popo_lightning.compare.plan import Arm, PlannedRun
from popo_lightning.core.errors import SettingError
from popo_lightning.data import RolloutDataModule
from popo_lightning.policy import PolicyModule


class ParsedOnly(PopoCLI):
    """Reads and checks a command; builds and runs nothing."""

    parser_kind = RaisingParser

    def _set_seed(self) -> None:
        """None is drawn."""

    def _settle_folder(self, config: Any) -> None:
        """Left to the run itself."""

    def instantiate_classes(self) -> None:
        """None."""

    def _run_subcommand(self, subcommand: str) -> None:
        """None."""


def check_commands(runs: Sequence[PlannedRun]) -> None:
    """Parses the command of one run of each arm: a third of a second each.

    Raises:
        SettingError: The first that popo fit would refuse.
    """
    checked: set[Arm] = set()
    for run in runs:
        if run.arm in checked:
            continue
        checked.add(run.arm)
        try:
            _parse(run.arguments())
        except SettingError as error:
            raise SettingError(f"method {run.arm.label}: {error}") from error


def _parse(arguments: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")  # as it does here
        ParsedOnly(PolicyModule, RolloutDataModule, args=arguments, **CLI_SETTINGS)
