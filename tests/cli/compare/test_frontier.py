"""The report's section on reuse, from runs written by hand that follow a law of round numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.comparisons import method_files, planned, read_comparison, write_comparison, write_run
from PIL import Image

from popo_lightning.cli.compare.command import main
from popo_lightning.cli.compare.frontier import levels_reached

EPOCHS = (1, 2, 4, 8)


def report(tmp_path: Path, needed_by_epochs: dict[int, list[float]], **more: Any) -> str:
    """Reports on runs whose accuracy rises linearly to 0.6 after the given responses, by epochs and seed.

    An iteration generates 25 tokens, trains on 25 x epochs, and has 1/40 of the given responses.
    """
    sweep = {f"epochs{epochs}": {"data.ppo_epochs": epochs} for epochs in needed_by_epochs}
    path = write_comparison(
        tmp_path, method_files("grpo"), sweep=sweep, seeds=[1, 2], frontier="grpo", **({"plots": False} | more)
    )
    comparison = read_comparison(path)
    for epochs, responses in needed_by_epochs.items():
        for seed, needed in enumerate(responses, start=1):
            curve = [0.2, 0.3, 0.4, 0.5, 0.6]  # after 40 iterations
            run = planned(comparison, "grpo", seed, f"epochs{epochs}")
            write_run(run, curve, responses=round(needed / 40), tokens=25 * epochs)
    assert main(["--config", str(path), "--report_only", "true"]) == 0
    return (tmp_path / "root" / "report.md").read_text("utf-8").split("## Reuse of grpo")[1].split("\n## ")[0]


def test_a_law_of_round_numbers(tmp_path: Path) -> None:
    """D = 2,000 + 8,000 / sigma: 10,000, 6,000, 4,000, 3,000; so 2,500 at 16. The first three predict the last."""
    found = report(tmp_path, {epochs: [2000 + 8000 / epochs] * 2 for epochs in EPOCHS})
    assert "| 0.600 | epochs1 | 1.00 | 10,000 |" in found and "| 0.600 | epochs8 | 8.00 | 3,000 |" in found
    assert "At avg@4 0.600: exponent 1.00, floor 2,000 responses. A reuse of 16.0, which was not run, " in found
    assert "would need 2,500 [2,500, 2,500] responses" in found
    assert "the settings below epochs8 predict 3,000 [3,000, 3,000] responses for it; it needed 3,000, so the" in found
    assert "+0% off" in found or "-0% off" in found
    assert "Seed by seed it is within 20% in 2 of 2, so the law predicts a setting here." in found
    # 0.4 is half of the way and takes half of the responses; 0.5 takes three quarters.
    assert "| 0.400 | epochs1 | 1.00 | 5,000 |" in found and "| 0.500 | epochs2 | 2.00 | 4,500 |" in found


@pytest.mark.parametrize(("start", "end"), [(0.0075, 0.0725), (0.03, 0.285), (0.0425, 0.1075)])
def test_the_highest_level_is_one_that_all_reach(start: float, end: float) -> None:
    """start + (end - start) may round to more than end."""
    runs: list[Any] = [SimpleNamespace(curve=lambda _: [SimpleNamespace(numbers={"acc": x}) for x in (start, end)])]
    assert levels_reached(runs, "acc")[-1] == end


def test_a_baseline_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    """The plot has one panel."""
    report(tmp_path, {1: [4000, 4400], 2: [6000, 6400], 4: [8000, 8400]}, plots=True, baseline="grpo")
    width, height = Image.open(tmp_path / "root" / "sweep.png").size
    assert width < 1.7 * height
    assert "by sweep label." in (tmp_path / "root" / "report.md").read_text()


def test_a_prediction_that_fails_is_told(tmp_path: Path) -> None:
    """The law of the other settings predicts 3,000 for the last. It needs 6,000, so the prediction is 50% too low."""
    found = report(tmp_path, {1: [10000, 10000], 2: [6000, 6000], 4: [4000, 4000], 8: [8800, 3200]})
    assert "it needed 6,000, so the prediction is -50% off" in found
    assert "Seed by seed it is within 20% in 1 of 2, so the law does not hold here." in found


def test_the_named_setting_is_the_cheapest_row(tmp_path: Path) -> None:
    found = report(tmp_path, {epochs: [2000 + 8000 / epochs + 700 * (epochs == 4)] * 2 for epochs in EPOCHS})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines() if "| epochs" in line]
    at_most = [row for row in rows if row[0] == "0.600"]
    cheapest = min(at_most, key=lambda row: float(row[4].replace(",", "")))
    (said,) = (line for line in found.splitlines() if "At avg@4 0.600: exponent" in line)
    assert f"Of the settings that were run {cheapest[1]} cost least." in said


def test_settings_of_one_reuse_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a sweep of learning rates beside epochs, one of them would vanish from the fit."""
    monkeypatch.setattr("popo_lightning.cli.compare.frontier.reuse_of", lambda run: min(4.0, float(run.arm.sweep[-1])))
    found = report(tmp_path, {epochs: [2000 + 8000 / epochs] * 2 for epochs in EPOCHS})
    assert "have the same reuse, which a law of reuse cannot tell apart" in found


def test_reuse_that_does_not_pay_is_told(tmp_path: Path) -> None:
    found = report(tmp_path, {1: [4000, 4400], 2: [6000, 6400], 4: [8000, 8400]})
    assert "At avg@4 0.600 no law of this form holds: more reuse does not save responses here." in found
    assert "was not run" not in found and "off" not in found.replace("of", "")


def test_a_level_that_one_run_never_reaches_is_not_compared(tmp_path: Path) -> None:
    sweep = {f"epochs{epochs}": {"data.ppo_epochs": epochs} for epochs in (1, 2, 4)}
    path = write_comparison(tmp_path, method_files("grpo"), sweep=sweep, seeds=[1], frontier="grpo", plots=False)
    comparison = read_comparison(path)
    for epochs in (1, 2, 4):
        curve = [0.2, 0.3, 0.2, 0.4] if epochs < 4 else [0.4, 0.4, 0.3, 0.3]
        write_run(planned(comparison, "grpo", 1, f"epochs{epochs}"), curve, tokens=25 * epochs)
    assert main(["--config", str(path), "--report_only", "true"]) == 0
    found = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert "No accuracy is reached by every run" in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"frontier": "grpo", "sweep": {"one": {"data.ppo_epochs": 1}}},
            "frontier is 'grpo', but sweep has 1 labels; a law needs three settings",
        ),
        ({"frontier": "popo"}, "frontier is 'popo'; name one of methods (grpo), or null"),
    ],
)
def test_settings_that_determine_no_law_are_refused(
    settings: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_comparison(tmp_path, method_files("grpo"), **settings)
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(path)])
    assert ended.value.code == 2 and words in capsys.readouterr().err
