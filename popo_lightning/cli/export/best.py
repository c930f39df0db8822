"""Chooses the best of the checkpoints that a run has kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from popo_lightning.cli.export.evaluations import Measured, measured_after
from popo_lightning.cli.export.saved_policy import SavedPolicy, opened
from popo_lightning.core.errors import SettingError
from popo_lightning.evaluation.benchmarks import MEAN
from popo_lightning.runs.checkpoint_files import flaw, written_at
from popo_lightning.runs.folder import checkpoint_folders


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
