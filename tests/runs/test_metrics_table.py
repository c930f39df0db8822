"""The rows of metrics.csv and the TensorBoard points that a resumed run keeps."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from popo_lightning.metrics.table import Behind, iterations_logged, loggers, read_rows

# Numbers whose decimals show whether they were rounded on the way.
ROWS: list[tuple[int, dict[str, float]]] = [
    (0, {"eval/x/greedy": 1 / 3}),
    (1, {"train/loss": 0.1 + 0.2, "reward/score": 1e-12}),
    (2, {"train/loss": -math.pi * 1e15, "reward/score": 2 / 3}),
    (2, {"eval/x/greedy": 5e-324}),
    (3, {"train/loss": 3.0, "policy/entropy": 0.7}),
    (4, {"train/loss": 4.0}),
]


def after(iterations: int, *evaluated: int) -> Behind:
    return Behind(iterations, iterations, frozenset(evaluated))


def write(folder: Path, behind: Behind | None, rows: list[tuple[int, dict[str, float]]]) -> None:
    table, board = loggers(folder, behind)
    for step, values in rows:
        table.log_metrics(dict(values), step=step)
        board.log_metrics(values, step=step)
    table.finalize("success")
    board.finalize("success")


def read(path: Path) -> list[tuple[int, dict[str, float]]]:
    with path.open(newline="") as file:
        return [
            (int(row["step"]), {name: float(v) for name, v in row.items() if v and name != "step"})
            for row in csv.DictReader(file)
        ]


def test_resumed_run_keeps_earlier_rows_and_drops_later_ones(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS)
    assert read(tmp_path / "metrics.csv") == ROWS
    whole = (tmp_path / "metrics.csv").read_bytes()
    assert list(tmp_path.glob("events.out.tfevents.*"))  # both are in the folder itself
    write(tmp_path, after(2, 0, 2), [(3, {"train/loss": 33.0})])
    assert read(tmp_path / "metrics.csv") == [*ROWS[:4], (3, {"train/loss": 33.0})]
    assert (tmp_path / "metrics.csv.before-resume").read_bytes() == whole


def test_an_evaluation_that_the_checkpoint_does_not_know_is_made_again_and_written_once(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS)
    write(tmp_path, after(2, 0), [(2, {"eval/x/greedy": 0.25})])
    assert read(tmp_path / "metrics.csv") == [*ROWS[:3], (2, {"eval/x/greedy": 0.25})]


def test_resumed_run_keeps_earlier_tensorboard_points(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def points() -> dict[int, float]:
        events = EventAccumulator(str(tmp_path)).Reload()
        return {point.step: point.value for point in events.Scalars("train/loss")}

    def age() -> None:
        for place, file in enumerate(sorted(tmp_path.glob("events.out.tfevents.*"))):  # read in order of names
            file.rename(tmp_path / f"events.out.tfevents.000000000{place}.earlier")

    write(tmp_path, None, ROWS)
    age()
    write(tmp_path, after(2, 0, 2), [(3, {"train/loss": 33.0})])
    assert sorted(points()) == [1, 2, 3] and points()[3] == 33.0
    age()
    write(tmp_path, None, [(1, {"train/loss": 11.0})])  # a new run
    assert points() == {1: 11.0}


def test_nothing_changes_before_the_first_row(tmp_path: Path) -> None:
    """A run that is refused after its loggers are made has changed nothing. The first row finds the kept rows."""
    write(tmp_path, None, ROWS)
    table = loggers(tmp_path, after(2, 0, 2))[0]
    assert table.experiment is not None  # Lightning does this too
    table.save()
    assert read(tmp_path / "metrics.csv") == ROWS
    table.log_metrics({"train/loss": 33.0}, step=3)
    assert read(tmp_path / "metrics.csv") == [*ROWS[:4], (3, {"train/loss": 33.0})]


def test_resuming_at_the_start_or_without_a_table(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS[:3])
    write(tmp_path, after(0, 0), ROWS[1:2])
    assert read(tmp_path / "metrics.csv") == ROWS[:2]
    write(tmp_path / "new", after(5), [(6, {"train/loss": 6.0})])
    assert read(tmp_path / "new" / "metrics.csv") == [(6, {"train/loss": 6.0})]
    assert not (tmp_path / "new" / "metrics.csv.before-resume").exists()
    assert isinstance(loggers(tmp_path / "new", after(6))[0], CSVLogger)


def test_a_run_that_begins_anew_keeps_no_row_and_loses_none(tmp_path: Path) -> None:
    write(tmp_path, None, ROWS)
    whole = (tmp_path / "metrics.csv").read_bytes()
    write(tmp_path, None, ROWS[:1])
    assert read(tmp_path / "metrics.csv") == ROWS[:1]
    assert (tmp_path / "metrics.csv.before-resume").read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_row_that_a_dying_process_left_half_written_is_no_row(tmp_path: Path, cut: int) -> None:
    write(tmp_path, None, ROWS)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    found = len(read_rows(path))
    assert found < len(ROWS)
    assert iterations_logged(tmp_path) == ROWS[found - 1][0]
    write(tmp_path, after(2, 0, 2), [(3, {"train/loss": 33.0})])
    assert read(path) == [*ROWS[:4], (3, {"train/loss": 33.0})]


def test_a_process_that_dies_while_the_header_changes_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = loggers(tmp_path, None)[0]
    table.log_metrics({"train/loss": 1.0}, step=1)
    monkeypatch.setattr("csv.DictWriter.writerows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        table.log_metrics({"policy/entropy": 1.0}, step=2)
    assert read(tmp_path / "metrics.csv") == [(1, {"train/loss": 1.0})]
