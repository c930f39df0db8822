"""The identity of a run: run.json in its folder, and the same record in each checkpoint."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.core.whole_files import replaced

RECORD = "run.json"
CONFIG = "config.yaml"  # all settings of a run, in its folder
KEEPER = "RunKeeper"  # key of the record in a checkpoint
DECISIVE = ("model", "data", "proximal", "parameter_hook", "seed_everything")  # settings that decide what is trained


@dataclass(frozen=True)
class RunRecord:
    """The identity of a run.

    Args:
        id: Random id, drawn when the run began.
        task: Name of the task.
        method: Name of the method.
        seed: Seed of all random draws.
        settings: The settings that decide what is trained: JSON values by dotted name.
        checkpoint_every: Iterations between checkpoints; None if the run keeps none.
        checkpoints: All folders the run has written checkpoints to. Folders inside the run's folder are relative to it.
        origin: The checkpoint the run began from, and its number of iterations; None if it began from the model.
        command: The latest command that trained it; None in records of an earlier version.
    """

    id: str
    task: str
    method: str
    seed: int
    settings: dict[str, str]
    checkpoint_every: int | None
    checkpoints: tuple[str, ...] = ()
    origin: dict[str, Any] | None = None
    command: str | None = None

    def began_from(self, checkpoint: Path | str) -> bool:
        """Whether the run began from this checkpoint of another run."""
        return self.origin is not None and Path(self.origin["checkpoint"]).resolve() == Path(checkpoint).resolve()

    def must_have_checkpoint(self, iterations: int) -> bool:
        """Whether a run with so many iterations should have a checkpoint; if it keeps none, after any iteration."""
        if self.checkpoint_every is None:
            return iterations > 0
        before = self.origin["iterations"] if self.origin else 0
        return iterations > (before // self.checkpoint_every + 1) * self.checkpoint_every

    def resumed_with(self, now: RunRecord) -> RunRecord:
        """This run with the settings of `now`, which is the record of the present command."""
        return replace(now, id=self.id, origin=self.origin, checkpoints=self.checkpoints)

    def writing_to(self, folder: Path, checkpoints: Path) -> RunRecord:
        """This record with one more folder of checkpoints.

        Args:
            folder: Folder of the run.
            checkpoints: Folder that the run will write checkpoints to.
        """
        return replace(self, checkpoints=tuple(dict.fromkeys([*self.checkpoints, inside(folder, checkpoints)])))

    def another_run(self, now: RunRecord) -> str | None:
        """The first difference between this run and the present one, apart from settings; None if there is none."""
        for name in ("task", "method", "seed"):
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                return f"{name} {before} there, {after} here"
        return None

    def difference(self, now: RunRecord) -> str | None:
        """The first difference between this run and the present one, with settings; None if there is none."""
        changed = (f"{name} {before} there, {after} here" for name, before, after in self.changes(now))
        return self.another_run(now) or next(changed, None)

    def changes(self, now: RunRecord) -> list[tuple[str, str, str]]:
        """Name, value in this run and present value of each setting that differs."""
        names = dict.fromkeys([*self.settings, *now.settings])
        values = [(name, self.settings.get(name, "not there"), now.settings.get(name, "not there")) for name in names]
        return [(name, before, after) for name, before, after in values if before != after]

    def write(self, folder: Path) -> None:
        """Writes run.json."""
        with replaced(folder / RECORD) as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")

    def to_plain(self) -> dict[str, Any]:
        """The record in plain containers."""
        return asdict(self) | {"checkpoints": list(self.checkpoints)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RunRecord:
        """Inverse of :meth:`to_plain`; ignores what a later version may add."""
        known = {field.name for field in fields(cls)}
        found = {name: value for name, value in plain.items() if name in known}
        return cls(**found | {"checkpoints": tuple(found.get("checkpoints", ()))})


def new_record(task: str, method: str, seed: int, settings: dict[str, str], checkpoint_every: int | None) -> RunRecord:
    """Record of a run that has not begun."""
    return RunRecord(uuid.uuid4().hex, task, method, seed, settings, checkpoint_every)


def read_record(folder: Path) -> RunRecord | None:
    """Record of a folder's run; None if an earlier version wrote the run or there is none.

    Raises:
        SettingError: The file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return RunRecord.from_plain(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(
            f"the run's folder '{folder}' has a damaged {RECORD}; delete that file, and name the checkpoint to "
            "resume from by ckpt_path"
        ) from error


def record_in(checkpoint: Mapping[str, Any]) -> tuple[RunRecord, Path] | None:
    """The run that wrote a checkpoint, and its folder at that time; None if an earlier version wrote it.

    Args:
        checkpoint: Contents of the checkpoint.
    """
    found = checkpoint.get("callbacks", {}).get(KEEPER)
    return None if found is None else (RunRecord.from_plain(found["run"]), Path(found["folder"]))


def inside(folder: Path, path: Path) -> str:
    """A path as it is recorded: relative if it is inside the run's folder, which may be moved."""
    folder, path = folder.absolute(), path.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def decisive_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that decide what is trained, as JSON by dotted name.

    Args:
        config: All settings of a command, in plain containers.
    """
    return {
        name: json.dumps(value)
        for kind in DECISIVE
        if kind in config
        for name, value in leaves(kind, config[kind]).items()
    }


def checkpoint_every(
    save_top_k: int, every_n_epochs: int | None, every_n_train_steps: int | None, steps: int
) -> int | None:
    """Iterations between checkpoints; None if none is kept.

    Args:
        save_top_k: Setting checkpoint.save_top_k.
        every_n_epochs: Setting checkpoint.every_n_epochs.
        every_n_train_steps: Setting checkpoint.every_n_train_steps.
        steps: Optimizer steps per iteration.
    """
    if save_top_k == 0:
        return None
    if every_n_train_steps:
        return -(-every_n_train_steps // steps)
    return 1 if every_n_epochs is None else every_n_epochs or None


def leaves(name: str, value: Any) -> dict[str, Any]:
    """The settings inside a setting, by dotted name; the setting itself if its value is no mapping or an empty one."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {path: leaf for key, below in value.items() for path, leaf in leaves(f"{name}.{key}", below).items()}
