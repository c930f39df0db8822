"""metrics.csv and TensorBoard events, and which of their rows a resumed run keeps."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from popo_lightning.core.errors import SettingError
from popo_lightning.core.whole_files import replaced

METRICS = "metrics.csv"
BEFORE = "metrics.csv.before-resume"
EVALUATED = "eval/"
Row = dict[str, str]


@dataclass(frozen=True)
class Behind:
    """The progress recorded in a checkpoint.

    Args:
        iterations: Iterations with a row in metrics.csv.
        begun: Number of iterations begun, including the present one.
        evaluated: Iterations after which the checkpoint records an evaluation.
    """

    iterations: int
    begun: int
    evaluated: frozenset[int]

    def knows(self, row: Row) -> bool:
        """Returns whether the checkpoint was written after a row of metrics.csv."""
        step = step_of(row)
        if step is None or step > self.iterations:
            return False
        return step in self.evaluated or not any(value for name, value in row.items() if name.startswith(EVALUATED))


class MetricsTable(CSVLogger):
    """Writes metrics.csv directly into the run's folder.

    An earlier file is unchanged until the first row is logged, so a refused run changes nothing.

    Args:
        folder: Folder of the run.
        behind: Progress of the checkpoint the run resumes from, whose rows stay. None keeps no row.
    """

    def __init__(self, folder: Path, behind: Behind | None) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self._behind = behind

    @property
    @rank_zero_experiment
    def experiment(self) -> RowWriter:
        """Writer of the rows."""
        if self._experiment is None:
            self._experiment = RowWriter(self.log_dir, self._behind)
        return self._experiment  # type: ignore[return-value]


class RowWriter(ExperimentWriter):
    """Lightning's writer, but it deletes no earlier file, and a killed process leaves no half-written file."""

    def __init__(self, log_dir: str, behind: Behind | None) -> None:
        super().__init__(log_dir)
        self._behind = behind
        self._began = False

    def save(self) -> None:
        """Writes the rows logged since the last call. The first call drops earlier rows that the checkpoint lacks."""
        if self.metrics and not self._began:
            self._begin()
            self._began = True
        super().save()

    def _begin(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        shutil.copyfile(path, path.with_name(BEFORE))
        kept = [] if self._behind is None else [row for row in read_rows(path) if self._behind.knows(row)]
        if not kept:
            path.unlink()
            return
        self.metrics_keys = list(kept[0])
        _write_rows(path, self.metrics_keys, kept)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, read_rows(path))

    def _check_log_dir_exists(self) -> None:
        """Does nothing, because Lightning's version deletes the file."""


def loggers(
    folder: Path, behind: Behind | None, further: Logger | Iterable[Logger] | bool | None = None
) -> list[Logger]:
    """Returns the loggers: metrics.csv and TensorBoard events in the folder itself, and any further loggers.

    Args:
        folder: The run's folder.
        behind: Progress of the checkpoint that the run resumes from. Rows that it knows stay; later ones, which will be
            written again, move to metrics.csv.before-resume. None for a new run.
        further: Value of trainer.logger; true and null mean no further logger.

    Raises:
        SettingError: A further logger would write over the run's own files.
    """
    first = 0 if behind is None else behind.iterations + 1
    purged = first if behind is not None or any(folder.glob("events.out.tfevents.*")) else None
    board = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=purged)
    if further is None or isinstance(further, bool):
        further = ()
    added = [further] if isinstance(further, Logger) else list(further)
    for logger in added:
        if isinstance(logger, CSVLogger | TensorBoardLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            raise SettingError(
                f"trainer.logger is a {type(logger).__name__} that writes to '{logger.log_dir}', the run's own folder, "
                "which has metrics.csv and TensorBoard events without it; leave it out, or give it another save_dir"
            )
    return [MetricsTable(folder, behind), board, *added]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of metrics.csv, without a line that a dying process left half-written."""
    with path.open(newline="") as file:
        whole = [line for line in file if line.endswith("\n")]
    rows = list(csv.DictReader(whole))
    return [row for row in rows if step_of(row) is not None and None not in row and None not in row.values()]


def numbers_by_iteration(path: Path) -> dict[int, dict[str, float]]:
    """Finite numbers of metrics.csv by iteration, in order; the row of an evaluation is merged into its iteration's."""
    found: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        numbers = {name: float(value) for name, value in row.items() if value and name != "step"}
        found.setdefault(int(row["step"]), {}).update({k: v for k, v in numbers.items() if math.isfinite(v)})
    return dict(sorted(found.items()))


def step_of(row: Row) -> int | None:
    """Returns the iteration of a row, or None if it has none."""
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return None


def iterations_logged(folder: Path) -> int:
    """Returns the last iteration in a run's metrics.csv; 0 without a row."""
    path = folder / METRICS
    return max((step_of(row) or 0 for row in read_rows(path)), default=0) if path.exists() else 0


def _write_rows(path: Path, names: list[str], rows: list[Row]) -> None:
    with replaced(path) as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
