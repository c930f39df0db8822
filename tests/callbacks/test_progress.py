"""What a terminal says at the beginning and at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import method, popo


def test_the_first_line_says_what_is_waited_for_and_the_last_what_to_do_next(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    popo("fit", "--config", config, *method("popo"), "--trainer.max_epochs", "1", "--run.folder", tmp_path / "a run")
    lines = capsys.readouterr().err.splitlines()
    (start,) = (place for place, line in enumerate(lines) if "starting TransformersEngine" in line)
    (evaluated,) = (place for place, line in enumerate(lines) if "evaluation after iteration 0" in line)
    assert start < evaluated and str(tmp_path / "a run") in lines[start]
    assert f"popo export '{tmp_path / 'a run'}'" in lines[-2]
    assert f"popo show '{tmp_path / 'a run'}'   or: tensorboard --logdir '{tmp_path / 'a run'}'" in lines[-1]


def test_a_run_without_checkpoints_offers_nothing_that_cannot_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ["--checkpoint.save_top_k", "0", "--trainer.max_epochs", "1", "--run.folder", tmp_path]
    popo("fit", "--config", config, *method("popo"), *none)
    assert "popo export" not in capsys.readouterr().err
