"""Reads every method's settings as ``popo fit`` reads them, before the first run begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popo_lightning.cli.compare.plan import PlannedRun
from popo_lightning.cli.parser import RaisingParser
from popo_lightning.cli.popo_cli import PopoCLI
from popo_lightning.core.errors import SettingError


class ParsedOnly(PopoCLI):
    """Reads and checks a command; builds and runs nothing. The settings are its `config`.

    Raises:
        SettingError: popo fit would refuse the command.
    """

    parser_kind = RaisingParser

    def _set_seed(self) -> None:
        """Skipped: nothing is sampled."""

    def _settle_folder(self, config: Any) -> None:
        """Skipped: the run itself decides."""

    def instantiate_classes(self) -> None:
        """Skipped: nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Skipped: nothing is run."""


def check_commands(runs: Sequence[PlannedRun]) -> None:
    """Parses the command of one run per arm, which takes a third of a second each.

    Raises:
        SettingError: popo fit would refuse a command; the first such refusal is raised.
    """
    for arm, run in {run.arm: run for run in runs}.items():
        try:
            ParsedOnly(run.arguments())
        except SettingError as error:
            raise SettingError(f"method {arm.label}: {error}") from error
