"""Real runs keep as many checkpoints on disk as the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from runs.test_checkpoints import short_fit

from cli.plan.test_plan_settings import read
from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.cli.plan.kept_checkpoints import OnDisk, on_disk

CASES: list[tuple[dict[str, Any], int, OnDisk | None]] = [
    ({"every_n_epochs": 20}, 3, OnDisk(1, 1)),
    ({"every_n_epochs": 2}, 3, OnDisk(1, 2)),
    ({"every_n_epochs": 3}, 3, OnDisk(1, 1)),
    ({"every_n_epochs": 2, "save_top_k": -1}, 3, OnDisk(2, 2)),
    ({"every_n_epochs": None}, 3, OnDisk(1, 2)),
    ({"every_n_epochs": 0}, 3, OnDisk(1, 1)),
    ({"every_n_epochs": None, "every_n_train_steps": 4, "save_top_k": -1}, 3, OnDisk(2, 2)),
    ({"every_n_epochs": None, "every_n_train_steps": 4}, 1, OnDisk(1, 1)),
    ({"every_n_epochs": 20, "save_last": True}, 3, OnDisk(1, 1)),
    ({"every_n_epochs": 1, "save_last": True}, 3, OnDisk(2, 3)),
    ({"every_n_epochs": 2, "save_last": True, "save_top_k": -1}, 3, OnDisk(2, 3)),
    ({"every_n_epochs": 2, "save_last": True, "save_top_k": 0}, 3, OnDisk(1, 2)),
    ({"every_n_epochs": 20, "save_last": "link"}, 3, OnDisk(1, 1)),
    ({"every_n_epochs": 1, "save_top_k": 0}, 3, None),
    ({"every_n_epochs": 1, "monitor": "quality", "mode": "max"}, 3, OnDisk(2, 3)),
    ({"every_n_epochs": 2, "monitor": "quality", "mode": "max", "save_top_k": 4}, 3, OnDisk(2, 3)),
]


class Watch(L.Callback):
    """Records how many checkpoints exist while one is written, and gives a metric that falls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.callback_metrics["quality"] = torch.tensor(-float(trainer.global_step))

    def look(self) -> None:
        self.most = max(self.most, len(files(self.folder)))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if not path.is_symlink()]


@pytest.mark.parametrize(("settings", "iterations", "expected"), CASES)
def test_the_plan_counts_what_a_run_keeps(
    policy: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    iterations: int,
    expected: OnDisk | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = {name: value for name, value in settings.items() if name != "mode"}
    assert on_disk(read({"max_epochs": iterations}, checkpoint=planned)) == expected
    folder = tmp_path / "checkpoints"
    watch = Watch(folder)
    real = Path.replace

    def replaced(self: Path, target: Any) -> Any:
        watch.look()  # the draft is complete, and the file it replaces still exists
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    callback = Checkpoints(folder, save_on_train_epoch_end=True, **settings)
    short_fit(policy, tmp_path, callback, callbacks=[watch], iterations=iterations)
    assert len(files(folder)) == (expected.kept if expected else 0)
    assert watch.most <= (expected.at_once if expected else 0)


def test_without_an_end() -> None:
    assert on_disk(read({"max_epochs": -1})) == OnDisk(1, 2)
    assert on_disk(read({"max_epochs": -1}, checkpoint={"save_top_k": 3, "save_last": True})) == OnDisk(4, 5)
    assert on_disk(read({"max_epochs": -1}, checkpoint={"save_top_k": -1})) is None
