"""Finds the checkpoint that a command means, and reads what it says of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from popo_lightning.cli.export.evaluations import Measured, measured_after
from popo_lightning.cli.export.options import SOURCE
from popo_lightning.core.errors import SettingError
from popo_lightning.evaluation.benchmarks import MEAN
from popo_lightning.runs.checkpoint_files import META, flaw, state_file, state_in, written_at
from popo_lightning.runs.folder import CHECKPOINTS, checkpoint_folders, holds_run, home_of, newest_of, progress
from popo_lightning.runs.record import RunRecord, read_record, record_in

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class SavedPolicy:
    """A checkpoint.

    Args:
        checkpoint: Path of its file or of its folder of shards.
        run: Folder of the run that wrote it; None if it cannot be found.
        state: Contents. Those of a file include the weights, which are read from the disk when they are used.
    """

    checkpoint: Path
    run: Path | None
    state: Mapping[str, Any]

    @cached_property
    def record(self) -> RunRecord | None:
        """Record of the run; None if an earlier version wrote the checkpoint."""
        found = record_in(self.state)
        if found is not None:
            return found[0]
        return None if self.run is None else read_record(self.run)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that decide what is trained, nested as in a config file; empty if they are not recorded."""
        return {} if self.record is None else nested(self.record.settings)

    @property
    def command(self) -> str | None:
        """Command that made the run; None if it is not recorded."""
        found = None if self.record is None else self.record.command
        return found if isinstance(found, str) else None

    @property
    def under_way(self) -> int:
        """Optimizer steps of an iteration that has minibatches left."""
        return self._progress[1]

    @property
    def iterations(self) -> int:
        """Iterations that ended before the checkpoint was written."""
        return self._progress[0]

    @property
    def _progress(self) -> tuple[int, int]:
        data = self.state.get("RolloutDataModule", {})
        left = max((len(rank.get("pending", ())) for rank in data.get("ranks", ())), default=0)
        return progress(int(data.get("iteration", 0)), int(data.get("steps", left)), left)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name.

        Args:
            name: Dotted name, such as data.temperature.
            default: Value of a setting that is not recorded.
        """
        found: Any = self.settings
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found


def saved_policy(place: str, best: bool = False) -> SavedPolicy:
    """Opens the checkpoint that a path means: itself, or the newest intact one of a run.

    Args:
        place: A run's folder, a checkpoint, or a run's folder of checkpoints.
        best: Take the run's best checkpoint instead of its newest.

    Raises:
        SettingError: No run is there, or its checkpoint is damaged.
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
        return opened(best_checkpoint(run), run)
    folders = checkpoint_folders(run)
    newest = newest_of(folders)
    if newest is None:
        looked = ", ".join(f"'{folder}'" for folder in folders)
        raise SettingError(
            f"{SOURCE} is '{place}', whose run has no whole checkpoint (looked for in {looked}); continue the run by "
            "--run.resume true, or name a checkpoint"
        )
    return opened(newest, run)


def opened(checkpoint: Path, run: Path | None = None) -> SavedPolicy:
    """Opens a checkpoint by its path.

    Args:
        checkpoint: Path of a file or of a folder of shards.
        run: Folder of its run, if known.

    Raises:
        SettingError: The checkpoint is not intact, or popo fit did not write it.
    """
    why = flaw(checkpoint)
    if why is not None:
        raise SettingError(f"the checkpoint '{checkpoint}' {why}; name another one")
    state = state_in(state_file(checkpoint))
    assert state is not None, "flaw() has looked"
    return SavedPolicy(checkpoint, run if run is not None else home_of(checkpoint.absolute()), state)


def nested(settings: Mapping[str, str]) -> dict[str, Any]:
    """Nests settings that have dotted names.

    Args:
        settings: Settings as in run.json, each value as JSON.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = json.loads(value)
    return found


# -- the best of the checkpoints that a run has kept ----------------------------------------------------------------


def best_checkpoint(run: Path) -> Path:
    """The intact checkpoint with the best value of checkpoint.monitor.

    A metric ``eval/NAME/LABEL`` has the value of the evaluation after the checkpoint's iteration, since a run saves its
    last checkpoint before its last evaluation. Other metrics, and a checkpoint without such an evaluation, have the
    value that the run noted when it saved. Without a monitor, evaluations decide: by the mean over benchmarks of greedy
    accuracy, or of avg@k if greedy accuracy is missing. The newest of equals is taken.

    Args:
        run: Folder of the run.

    Raises:
        SettingError: No kept checkpoint has such a value.
    """
    whole = [path for folder in checkpoint_folders(run) for path in folder.glob("*.ckpt") if flaw(path) is None]
    if not whole:
        raise SettingError(f"--best is given, but the run in '{run}' has no whole checkpoint; continue the run first")
    saved = sorted((opened(path, run) for path in whole), key=lambda each: written_at(each.checkpoint))
    noted = _noted(saved[-1])
    monitor = noted.get("monitor")
    noted_scores = {Path(path).name: float(score) for path, score in dict(noted.get("best_k_models") or {}).items()}

    def score(each: SavedPolicy) -> float | None:
        evaluation = None if each.under_way else measured_after(run, each.iterations)
        if not monitor:
            return _accuracy(evaluation)
        measured = _metric(evaluation, str(monitor))
        return noted_scores.get(each.checkpoint.name) if measured is None else measured

    scored = [(value, each) for each in saved if (value := score(each)) is not None]
    if not scored:
        what = f"of checkpoint.monitor, {monitor}" if monitor else "of an evaluation (checkpoint.monitor is null)"
        raise SettingError(
            f"--best is given, but no checkpoint that the run in '{run}' has kept has a value {what}; drop it, or have "
            "a run keep them by checkpoint.monitor, or by checkpoint.save_top_k -1"
        )
    best = (min if monitor and noted.get("mode") == "min" else max)(value for value, _ in scored)
    return [each.checkpoint for value, each in scored if value == best][-1]


def _noted(saved: SavedPolicy) -> Mapping[str, Any]:
    """State that ModelCheckpoint saved, with its mode, which is part of the state's key."""
    for name, state in saved.state.get("callbacks", {}).items():
        if name.startswith("Checkpoints") and isinstance(state, Mapping):
            return {**state, "mode": "max" if "'mode': 'max'" in name else "min"}
    return {}


def _metric(found: Measured | None, monitor: str) -> float | None:
    """Value of a metric ``eval/NAME/LABEL`` in an evaluation; None for any other metric."""
    kind, _, rest = monitor.partition("/")
    name, _, label = rest.rpartition("/")
    return None if found is None or kind != "eval" else found.benchmarks.get(name, {}).get(label)


def _accuracy(found: Measured | None) -> float | None:
    if found is None:
        return None
    own = [numbers for name, numbers in found.benchmarks.items() if name != MEAN]
    for kind in ("greedy", "avg_at_"):
        values = [value for numbers in own for label, value in numbers.items() if label.startswith(kind)]
        if values and len(values) == len(own):
            return sum(values) / len(values)
    return None
