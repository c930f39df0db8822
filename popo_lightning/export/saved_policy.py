"""The checkpoint that a command means, and what it says of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.export.options import SOURCE
from popo_lightning.runs.checkpoint_files import META, flaw, state_in
from popo_lightning.runs.folder import CHECKPOINTS, checkpoint_folders, holds_run, home_of, newest_of
from popo_lightning.runs.record import RunRecord, read_record, record_in

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class SavedPolicy:
    """A checkpoint.

    Args:
        checkpoint: Its file, or its folder of shards.
        run: Folder of the run that wrote it; None where it is not to be found.
        state: What it holds: of a file the weights too, which are read from the disk when they are used.
    """

    checkpoint: Path
    run: Path | None
    state: Mapping[str, Any]

    @cached_property
    def record(self) -> RunRecord | None:
        """Of the run; None where an earlier version wrote it."""
        found = record_in(self.state)
        if found is not None:
            return found[0]
        return None if self.run is None else read_record(self.run)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Those that decide what is trained, nested as in a config file; empty where they are not recorded."""
        return {} if self.record is None else nested(self.record.settings)

    @property
    def command(self) -> str | None:
        """That made the run, where it is recorded."""
        found = None if self.record is None else self.record.command
        return found if isinstance(found, str) else None

    @property
    def under_way(self) -> int:
        """Optimizer steps of an iteration that had not ended."""
        return len(self.state.get("callbacks", {}).get("Monitor", {}).get("steps", ()))

    @property
    def iterations(self) -> int:
        """Finished before it was written."""
        begun = int(self.state.get("RolloutDataModule", {}).get("iteration", 0))
        return begun - bool(self.under_way)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name.

        Args:
            name: Such as data.temperature.
            default: Where it is not recorded.
        """
        found: Any = self.settings
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found


def saved_policy(place: str, best: bool = False) -> SavedPolicy:
    """The checkpoint that a path means: itself, or the newest whole one of a run.

    Args:
        place: A run's folder, a checkpoint, or a run's folder of checkpoints.
        best: Take the run's best instead of its newest.

    Raises:
        SettingError: Nothing of a run is there, or its checkpoint is damaged.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise SettingError(f"{SOURCE} is '{place}', which does not exist; name a run's folder or a checkpoint")
    if not path.is_dir() or path.suffix == ".ckpt" or (path / META).exists() or (path / ".metadata").exists():
        if best:
            raise SettingError(f"--best is given, but '{place}' is one checkpoint; name the run's folder, or drop it")
        return opened(path)
    run = path.parent if path.name == CHECKPOINTS and not holds_run(path) else path
    if not holds_run(run):
        kind = "a model folder, which transformers loads as it is" if (run / MODEL_CONFIG).exists() else "no run's"
        raise SettingError(f"{SOURCE} is the folder '{place}', which is {kind}; name a run's folder or a checkpoint")
    if best:
        from popo_lightning.export.best import best_checkpoint

        return opened(best_checkpoint(run), run)
    folders = checkpoint_folders(run)
    newest = newest_of(folders)
    if newest is None:
        looked = ", ".join(f"'{folder}'" for folder in folders)
        raise SettingError(
            f"{SOURCE} is '{place}', whose run has no whole checkpoint (looked for in {looked}); go on with the run by "
            "--run.resume true, or name a checkpoint"
        )
    return opened(newest, run)


def opened(checkpoint: Path, run: Path | None = None) -> SavedPolicy:
    """A checkpoint by its path.

    Args:
        checkpoint: A file or a folder of shards.
        run: Folder of its run, where it is known.

    Raises:
        SettingError: It is not whole, or popo fit did not write it.
    """
    why = flaw(checkpoint)
    if why is not None:
        raise SettingError(f"the checkpoint '{checkpoint}' {why}; name another one")
    state = state_in(checkpoint / META if checkpoint.is_dir() else checkpoint)
    assert state is not None, "flaw() has looked"
    return SavedPolicy(checkpoint, run if run is not None else home_of(checkpoint.absolute()), state)


def nested(settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings by dotted name as mappings within mappings.

    Args:
        settings: As run.json has them, each value as JSON.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = json.loads(value)
    return found
