"""The runs of a comparison, their folders, and the check that a folder holds the planned run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from popo_lightning import __version__
from popo_lightning.cli.compare.settings import Comparison, flattened
from popo_lightning.cli.shipped_configs import config_path
from popo_lightning.core.errors import SettingError
from popo_lightning.core.whole_files import replaced

RUNS = "runs"
RECORD = "compare.json"
SUMMARY = "summary.json"


@dataclass(frozen=True, order=True)
class Arm:
    """What the runs of all seeds have in common.

    Args:
        method: Name of the method.
        sweep: Label of the swept settings; empty if nothing is swept.
    """

    method: str
    sweep: str = ""

    @property
    def label(self) -> str:
        """Label for tables and legends."""
        return f"{self.method}, {self.sweep}" if self.sweep else self.method


@dataclass(frozen=True)
class PlannedRun:
    """A planned run.

    Args:
        arm: Method and sweep label.
        seed: Seed of the run.
        folder: Folder that the run writes to.
        config: YAML files, in order.
        settings: Settings added on the command line after the files, without the seed.
    """

    arm: Arm
    seed: int
    folder: Path
    config: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def label(self) -> str:
        """Label for messages."""
        return f"{self.arm.label}, seed {self.seed}"

    def arguments(self) -> list[str]:
        """Arguments of popo."""
        files = [word for file in self.config for word in ("--config", file)]
        own = [f"--run.folder={self.folder}", "--run.resume=true", f"--seed_everything={self.seed}"]
        return ["fit", *files, *self.settings, *own]

    def command(self) -> list[str]:
        """Command that starts the process."""
        return [sys.executable, "-m", "popo_lightning", *self.arguments()]

    def record(self) -> dict[str, Any]:
        """What decides the run's numbers, written beside them."""
        return {
            "method": self.arm.method,
            "sweep": self.arm.sweep,
            "seed": self.seed,
            "config": [{"path": file, "sha256": _digest(file)} for file in self.config],
            "settings": list(self.settings),
            "command": self.command(),
            "version": __version__,
            "torch": version("torch"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        }


def plan(comparison: Comparison) -> list[PlannedRun]:
    """All planned runs. Seeds are outermost, so that a comparison stopped early has whole sets of methods."""
    seeds = list(dict.fromkeys([*comparison.seeds, *(s for m in comparison.methods.values() for s in m.seeds or [])]))
    return [
        planned_run(comparison, Arm(name, label), seed)
        for seed in seeds
        for label in comparison.variants()
        for name, method in comparison.methods.items()
        if seed in (comparison.seeds if method.seeds is None else method.seeds)
    ]


def planned_run(comparison: Comparison, arm: Arm, seed: int) -> PlannedRun:
    """Plans one run."""
    method = comparison.methods[arm.method]
    settings = flattened(comparison.arguments) | flattened(comparison.variants()[arm.sweep])
    settings |= flattened(method.arguments)
    words = (f"--run.method={arm.method}", *(f"--{name}={_text(value)}" for name, value in settings.items()))
    name = f"{arm.sweep}-seed{seed}" if arm.sweep else f"{arm.method}-seed{seed}"
    above = comparison.folder / RUNS
    folder = above / arm.method / name if arm.sweep else above / name
    return PlannedRun(arm, seed, folder, tuple(map(config_path, (*comparison.task, *method.config))), words)


def is_finished(run: PlannedRun) -> bool:
    """Whether the run's folder holds the finished run; False if it has yet to begin or to be resumed.

    Raises:
        SettingError: The folder holds another run.
    """
    found = read_record(run.folder)
    if found is None:
        fault = "which holds a run that popo compare did not begin"
        wrong = any((run.folder / name).exists() for name in ("metrics.csv", "checkpoints", SUMMARY))
    else:
        difference = difference_between(found, run.record())
        fault, wrong = f"whose run was made with other settings ({difference})", difference is not None
    if wrong:
        raise SettingError(f"root has the folder '{run.folder}', {fault}; name another root, or delete that folder")
    return (run.folder / SUMMARY).exists()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Reads the record beside a run; None if there is none.

    Raises:
        SettingError: The file is not a valid record.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        _decisive(found)
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"root has the file '{path}', which is damaged; delete the folder it lies in") from error
    return found


def write_record(run: PlannedRun) -> None:
    """Writes the record of a run into its folder."""
    with replaced(run.folder / RECORD) as file:
        file.write(json.dumps(run.record(), indent=2) + "\n")


def difference_between(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first difference in what decides the numbers, apart from the seed; None if there is none.

    Files are compared by name and content, not by folder.
    """
    then, now = _decisive(there), _decisive(wanted)
    for name in [*then, *(name for name in now if name not in then)]:
        before, after = then.get(name, "not there"), now.get(name, "not there")
        if before != after:
            return f"another {name}" if name.startswith("file ") else f"{name} {before}, now {after}"
    return None


def _decisive(record: Mapping[str, Any]) -> dict[str, str]:
    files = {f"file {Path(file['path']).name}": str(file["sha256"]) for file in record["config"]}
    order = {"file order": " ".join(str(file["sha256"]) for file in record["config"])}
    settings = dict(str(word).removeprefix("--").split("=", 1) for word in record["settings"])
    return files | settings | order


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _text(value: Any) -> str:
    """Formats a value so that the command line reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
