"""The report's numbers, from run folders written by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.comparisons import cells, planned, read_comparison, write_comparison, write_run

from popo_lightning.cli.compare.command import main
from popo_lightning.cli.compare.plots import COLORS

GRPO = {1: [0.1, 0.2, 0.3, 0.3, 0.3], 2: [0.1, 0.2, 0.3, 0.3, 0.5], 3: [0.1, 0.1, 0.2, 0.2, 0.2]}
POPO = {1: [0.1, 0.4, 0.4, 0.4, 0.4], 2: [0.1, 0.3, 0.5, 0.5, 0.5], 3: [0.1, 0.1, 0.1, 0.1, 0.1]}
DAPO = {1: [0.1, 0.4, 0.4, 0.5, 0.5], 2: [0.1, 0.4, 0.4, 0.5, 0.5]}  # its third seed has not run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hand")
    path = write_comparison(folder, dynamic_sampling="dapo")
    comparison = read_comparison(path)
    for seed in (1, 2, 3):
        write_run(planned(comparison, "grpo", seed), GRPO[seed], seconds=2.0 * seed)
        write_run(planned(comparison, "popo", seed), POPO[seed], seconds=3.0, ages={1: 0.9, 12: 0.5})
    for seed in (1, 2):
        write_run(planned(comparison, "dapo", seed), DAPO[seed], responses=200 * seed, effective=1.0)
    assert main(["--config", str(path), "--report_only", "true"]) == 0
    return folder / "root"


@pytest.fixture(scope="module")
def report(root: Path) -> str:
    return (root / "report.md").read_text("utf-8")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_final_accuracy(report: str) -> None:
    """The last two evaluations have means 0.3, 0.4, 0.2, whose std is 0.1; 4.3027 * 0.1 / sqrt(3) = 0.248."""
    found = cells(report, "Final accuracy", "grpo")
    assert found["avg@4"] == "0.300 [0.052, 0.548]"
    assert found["greedy accuracy"].startswith("0.400 [")
    assert found["pass@8"].startswith("0.500 [")
    assert found["seeds"] == "3"
    assert cells(report, "Final accuracy", "dapo")["seeds"] == "2"


def test_differences_are_paired(report: str) -> None:
    """By seed +0.1, +0.1, -0.1: std 0.11547, so 4.3027 * 0.06667 = 0.287. To dapo -0.1 and 0: 12.706 * 0.05."""
    found = cells(report, "Difference to grpo", "popo")
    assert found["avg@4"] == "+0.033 [-0.254, +0.320]"
    assert found["pairs"] == "3"
    assert cells(report, "Difference to grpo", "dapo")["pairs"] == "2"
    assert cells(report, "Difference to dapo", "popo")["avg@4"] == "-0.050 [-0.685, +0.585]"


def test_target_is_the_same_seeds_baseline(report: str) -> None:
    """Targets 0.3, 0.4, 0.2 are reached after 6.67, 15 and never. The median counts the last one too."""
    found = cells(report, "To reach grpo's final avg@4", "popo")
    assert found["reached"] == "2 of 3"
    assert found["iterations"] == "15"
    assert found["of grpo's"] == "38%"  # of 40
    assert found["responses"] == "1,500"
    assert found["seconds"] == "45"
    own = cells(report, "To reach grpo's final avg@4", "grpo")
    assert (own["iterations"], own["reached"]) == ("20", "3 of 3")  # 20, 35 (between evaluations) and 20
    dapo = cells(report, "To reach grpo's final avg@4", "dapo")
    assert (dapo["reached"], dapo["iterations"]) == ("2 of 2", "8")  # 6.67 and 10


def test_responses_against_dynamic_sampling(report: str) -> None:
    """4,000 against 8,000 and 16,000 are a half and a quarter."""
    found = cells(report, "What a run costs", "popo")
    assert found["of dapo's"] == "0.38 [0.25, 0.50]"
    assert found["responses"] == "4,000"
    assert found["tokens trained"] == "2,000"
    assert found["seconds"] == "120"
    assert cells(report, "What a run costs", "dapo")["responses"] == "12,000 [8,000, 16,000]"


def test_groups_and_weights(report: str) -> None:
    found = cells(report, "Groups, weights and policy", "popo")
    assert found["effective share"] == "50.0%"
    assert found["replayed share"] == "50.0%"
    assert found["mean age"] == "–"
    assert found["entropy at the end"] == "0.500"
    assert found["largest weight"] == "1.40"
    ages = cells(report, "Effective sample size by age", "popo")
    assert (ages["age 1"], ages["age 12"]) == ("0.900", "0.500")
    assert cells(report, "Seconds by phase", "popo")["train"] == "40.0"


def test_report_says_what_it_rests_on(report: str) -> None:
    for words in (
        "8 finished runs",
        "2 to 3 seeds",
        "countdown: 500 problems, 8 samples",
        "95% t intervals",
        "fewer than five seeds",
        "Each interval is for itself",
        "Brackets are the least and the largest seed",
        "1 of the runs asked for are not in these numbers",
        "dapo, seed 3: not finished",
        "can be compared only if nothing else ran",
    ):
        assert words in report, words


def test_tables_for_other_programs(root: Path) -> None:
    runs = rows(root / "runs.csv")
    assert len(runs) == 8
    popo = {row["seed"]: row for row in runs if row["method"] == "popo"}
    assert float(popo["2"]["target"]) == pytest.approx(0.4)
    assert float(popo["2"]["iterations_to_target"]) == pytest.approx(15)
    assert popo["3"]["iterations_to_target"] == ""
    assert popo["3"]["age_mean"] == "", "not a number is no text"
    curves = [row for row in rows(root / "curves.csv") if row["method"] == "grpo" and row["seed"] == "2"]
    assert [float(row["iteration"]) for row in curves] == [0, 10, 20, 30, 40]
    assert [float(row["responses"]) for row in curves] == [0, 1000, 2000, 3000, 4000]
    assert [float(row["seconds"]) for row in curves] == [0, 40, 80, 120, 160]
    assert [float(row["tokens"]) for row in curves] == [0, 500, 1000, 1500, 2000]
    assert [float(row["avg_at_k"]) for row in curves] == pytest.approx(GRPO[2])
    assert [float(row["eval/countdown/pass_at_8"]) for row in curves] == pytest.approx([v + 0.2 for v in GRPO[2]])


def test_figures(root: Path, report: str) -> None:
    for name in ("curves.png", "final.png", "effective.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in report
    assert not (root / "sweep.png").exists()
    assert len(set(COLORS)) == len(COLORS)


def test_sweep(tmp_path: Path) -> None:
    """Methods differ at each label, but not when each is at its best label."""
    sweep = {"low": {"model.optimizer.init_args.lr": 1e-5}, "high": {"model.optimizer.init_args.lr": 1e-4}}
    methods = {name: {"config": []} for name in ("grpo", "popo")}
    path = write_comparison(tmp_path, methods, sweep=sweep, seeds=[1], final_evaluations=1)
    comparison = read_comparison(path)
    for method, label, final in (
        ("grpo", "low", 0.2),
        ("grpo", "high", 0.4),
        ("popo", "low", 0.4),
        ("popo", "high", 0.1),
    ):
        write_run(planned(comparison, method, 1, label), [0.1, final])
    assert main(["--config", str(path), "--report_only", "true"]) == 0
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    title = "Sweep: final avg@4"
    assert cells(report, title, "grpo") == {"method": "grpo", "low": "0.200", "high": "0.400", "best": "high"}
    apart = cells(report, title, "popo - grpo")
    assert (apart["low"], apart["high"], apart["best"]) == ("+0.200", "-0.300", "+0.000")
    assert cells(report, "Difference to grpo", "popo, high")["avg@4"] == "-0.300"
    assert cells(report, "To reach grpo's final avg@4", "popo, high")["iterations"] == "not reached"
    for name in ("curves-low.png", "curves-high.png", "sweep.png"):
        assert (tmp_path / "root" / name).exists()
    assert "no interval" in report


def test_given_target_needs_no_baseline(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, {"popo": {}}, baseline=None, target=0.25, seeds=[1])
    write_run(planned(read_comparison(path), "popo", 1), POPO[1])
    assert main(["--config", str(path), "--report_only", "true", "--plots", "false"]) == 0
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert cells(report, "To reach avg@4 0.25", "popo")["iterations"] == "5"
    assert "Difference to" not in report


def test_the_evaluation_before_training_is_never_final(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, {"popo": {}}, baseline=None, seeds=[1], final_evaluations=9)
    write_run(planned(read_comparison(path), "popo", 1), POPO[1])
    assert main(["--config", str(path), "--report_only", "true", "--plots", "false"]) == 0
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert cells(report, "Final accuracy", "popo")["avg@4"] == "0.400"
    assert "1 of 1 runs have fewer" in report


def test_estimate_where_no_method_samples_dynamically(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, {"popo": {}}, baseline=None, seeds=[1])
    write_run(planned(read_comparison(path), "popo", 1), POPO[1], effective=0.4)
    assert main(["--config", str(path), "--report_only", "true", "--plots", "false"]) == 0
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert cells(report, "What a run costs", "popo")["of dynamic sampling's (estimate)"] == "0.40"


def test_other_runs_below_the_root(tmp_path: Path) -> None:
    """Another seed with equal settings counts. One with other settings is named, and not included."""
    path = write_comparison(tmp_path, {"popo": {}}, baseline=None, seeds=[1])
    write_run(planned(read_comparison(path), "popo", 1), POPO[1])
    write_run(planned(read_comparison(path, "--seeds", "[2]"), "popo", 2), POPO[2])
    other = read_comparison(path, "--seeds", "[3]", "--arguments", '{"trainer.max_epochs": 999}')
    write_run(planned(other, "popo", 3), POPO[3])
    assert main(["--config", str(path), "--report_only", "true", "--plots", "false"]) == 0
    report = (tmp_path / "root" / "report.md").read_text("utf-8")
    assert cells(report, "Final accuracy", "popo")["seeds"] == "2"
    assert "popo-seed3: made with other settings (trainer.max_epochs 999" in report


def test_nothing_has_finished(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, seeds=[1])
    assert main(["--config", str(path), "--report_only", "true"]) == 0
    assert "0 finished runs" in (tmp_path / "root" / "report.md").read_text("utf-8")


def damage(folder: Path, how: str) -> None:
    summary = folder / "summary.json"
    content: dict[str, Any] = json.loads(summary.read_text())
    texts = {"cut": summary.read_text()[:50], "list": "[]", "no evaluations": json.dumps(content | {"evaluations": 3})}
    summary.write_text(texts[how])


@pytest.mark.parametrize("how", ["cut", "list", "no evaluations"])
def test_damaged_summary_is_one_sentence(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_comparison(tmp_path, {"popo": {}}, baseline=None, seeds=[1])
    run = planned(read_comparison(path), "popo", 1)
    write_run(run, POPO[1])
    damage(run.folder, how)
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(path), "--report_only", "true"])
    assert stopped.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert str(run.folder) in sentence
    assert "delete" in sentence
