"""Evaluation over several benchmarks: files agree with the metrics, and validate finds what training found."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from helpers.benchmarks import HOSTILE, LARGE, SMALL
from helpers.nodes import one_node
from helpers.tiny_models import TASK, fit, method, metrics, popo, popo_process, write_config

from popo_lightning.evaluation.callback import Evaluation

Rows = list[dict[str, Any]]
FILES = {SMALL: "small.jsonl", LARGE: quote(LARGE, safe=" ") + ".jsonl"}
SETTINGS = {SMALL: {"pass_k": [3, 1]}, LARGE: {"samples": 4, "temperature": 0.0, "max_new_tokens": 4, "limit": 4}}


def two_benchmarks(path: Path, task: str = "TwoBenchmarks", **evaluation: Any) -> Path:
    """Writes a configuration with both benchmarks."""
    content = yaml.safe_load(write_config(path).read_text())
    content["data"]["task"] = {"class_path": f"helpers.benchmarks.{task}", "init_args": TASK}
    settings = {"every_n_iterations": 1, "samples": 3, "avg_k": 2, "pass_k": 2, "benchmarks": SETTINGS}
    content["evaluation"] = settings | evaluation
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def config(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_benchmarks(tmp_path_factory.mktemp("config") / "two.yaml")


@pytest.fixture(scope="module")
def command(config: Path) -> list[str | Path]:
    slow = ["--model.optimizer.init_args.lr", "0.0003"]  # at a higher rate the policy breaks and no answer is right
    often = ["--trainer.max_epochs", "2", "--checkpoint.every_n_epochs", "1"]
    return ["fit", "--config", config, *method("grpo"), *slow, *often]


@pytest.fixture(scope="module")
def finished(command: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs a separate process and returns the run's folder and what a user saw."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done = popo_process(*command, "--run.folder", folder, "--checkpoint.save_top_k", "-1")
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def rows_of(folder: Path) -> dict[str, Rows]:
    return {
        name: [json.loads(line) for line in (folder / file).read_text().splitlines()] for name, file in FILES.items()
    }


def by_problem(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        found[row["problem"]].append(row)
    return dict(found)


def counted(rows: Rows, avg_k: int, pass_k: Sequence[int]) -> dict[str, float]:
    """Counts the metrics by hand from the rows of a file."""
    greedy = [row["acc"] for row in rows if row["greedy"]]
    sampled = [row for row in rows if not row["greedy"]]
    problems = [[row["acc"] for row in them] for them in by_problem(sampled).values()]
    numbers = {
        "problems": len(problems),
        "greedy": sum(greedy) / len(greedy),
        f"avg_at_{avg_k}": sum(sum(right[:avg_k]) / avg_k for right in problems) / len(problems),
        "response_tokens": sum(row["tokens"] for row in sampled) / len(sampled),
        "truncated_frac": sum(row["finish_reason"] == "length" for row in sampled) / len(sampled),
        "grading_failures": sum(row["failure"] is not None for row in rows),
    }
    for k in pass_k:
        chances = [[any(drawn) for drawn in combinations(right, k)] for right in problems]
        numbers[f"pass_at_{k}"] = sum(sum(chance) / len(chance) for chance in chances) / len(problems)
    return numbers


KS: dict[str, tuple[int, list[int]]] = {SMALL: (2, [1, 3]), LARGE: (2, [2])}


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_numbers_are_those_of_the_written_responses(finished: tuple[Path, str], iteration: int) -> None:
    folder = finished[0]
    logged = next(row for row in metrics(folder) if row["step"] == iteration and f"eval/{SMALL}/greedy" in row)
    logged = {name: value for name, value in logged.items() if name.startswith("eval/")}
    rows = rows_of(folder / "evaluations" / f"iteration-{iteration:06d}")
    results = json.loads((folder / "evaluations" / f"iteration-{iteration:06d}" / "results.json").read_text())
    expected = {}
    for name, ks in KS.items():
        numbers = counted(rows[name], *ks)
        assert results["benchmarks"][name]["numbers"] == pytest.approx(numbers)
        expected |= {f"eval/{name}/{label}": value for label, value in numbers.items() if label != "problems"}
    for label in ("greedy", "avg_at_2"):
        expected[f"eval/mean/{label}"] = sum(expected[f"eval/{name}/{label}"] for name in KS) / 2
    assert logged == pytest.approx(expected)
    assert results["mean"] == pytest.approx({k: expected[f"eval/mean/{k}"] for k in ("greedy", "avg_at_2")})
    assert expected[f"eval/{SMALL}/grading_failures"] > 0
    assert 0 < expected[f"eval/{SMALL}/avg_at_2"] < 1, "all right or all wrong would prove little"


def test_settings_of_a_benchmark_are_obeyed(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0] / "evaluations" / "iteration-000000")
    problems = {name: list(by_problem(found).values()) for name, found in rows.items()}
    assert {name: len(found) for name, found in problems.items()} == {SMALL: 7, LARGE: 4}  # the limit takes 4 of 5
    assert {len(them) for them in problems[SMALL]} == {1 + 3} and {len(them) for them in problems[LARGE]} == {1 + 4}
    for them in (*problems[SMALL], *problems[LARGE]):
        assert [row["greedy"] for row in them] == [True] + [False] * (len(them) - 1)
        assert [row["sample"] for row in them] == [0, *range(len(them) - 1)]
    assert all(len({row["response"] for row in them}) == 1 for them in problems[LARGE])  # temperature 0
    assert any(len({row["response"] for row in them}) > 1 for them in problems[SMALL])  # temperature 1
    assert max(row["tokens"] for row in rows[LARGE]) == 4 < max(row["tokens"] for row in rows[SMALL])
    assert all((row["tokens"] == 4) for row in rows[LARGE] if row["finish_reason"] == "length")


def test_the_breakdown_adds_up(finished: tuple[Path, str]) -> None:
    folder = finished[0] / "evaluations" / "iteration-000002"
    results = json.loads((folder / "results.json").read_text())["benchmarks"]
    rows = rows_of(folder)[SMALL]
    assert results[LARGE]["breakdown"] == {}  # one level is not a breakdown
    parts, whole = results[SMALL]["breakdown"], results[SMALL]["numbers"]
    assert list(parts) == ["level", "subject"]
    assert list(parts["level"]) == ["2", "10"]
    assert list(parts["subject"]) == [*sorted([HOSTILE, "sums"]), "(none)"]
    for field, values in parts.items():
        for value, numbers in values.items():
            own = [row for row in rows if value == ("(none)" if row[field] is None else str(row[field]))]
            assert numbers == pytest.approx(counted(own, *KS[SMALL])), (field, value)
        assert sum(numbers["problems"] for numbers in values.values()) == whole["problems"]
        for label in ("greedy", "avg_at_2", "pass_at_1", "pass_at_3", "response_tokens", "truncated_frac"):
            total = sum(numbers[label] * numbers["problems"] for numbers in values.values())
            assert total / whole["problems"] == pytest.approx(whole[label])
    assert not [name for row in metrics(finished[0]) for name in row if "level" in name or "subject" in name]


def test_rows_hold_what_a_reader_needs(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0] / "evaluations" / "iteration-000002")
    row = next(row for row in rows[SMALL] if row["subject"] == HOSTILE)
    assert row["benchmark"] == SMALL and row["prompt"].endswith(":") and row["answer"]["target"] is not None
    assert row["parts"]["score"] == row["score"] and row["level"] in (2, 10) and row["failure"] is None
    assert {"response", "tokens", "finish_reason", "greedy"} <= row.keys()
    assert not list((finished[0] / "evaluations").rglob("*.draft"))


# -- what a user sees ----------------------------------------------------------------------------------------------


def test_tables_in_the_terminal(finished: tuple[Path, str]) -> None:
    shown = finished[1]
    results = json.loads((finished[0] / "evaluations" / "iteration-000002" / "results.json").read_text())
    for iteration in (0, 1, 2):
        start = shown.index(f"evaluation after iteration {iteration}")
        table = shown[start:].splitlines()[:8]
        assert all(heading in table[1] for heading in ("problems", "greedy", "avg@2", "pass@1", "pass@3", "truncated"))
        assert [name for line in table for name in (SMALL, LARGE, "mean") if line.strip().startswith(name)] == [
            SMALL,
            LARGE,
            "mean",
        ]
    small = results["benchmarks"][SMALL]["numbers"]
    assert f"{small['avg_at_2']:.3f}" in next(line for line in table if line.strip().startswith(SMALL))
    assert "\x1b" not in shown and "[red]a | b[/red] `x`" in shown  # brackets are text, not markup
    assert shown.count("subject") == 3  # parts of the last evaluation only
    first = metrics(finished[0])[0][f"eval/{SMALL}/avg_at_2"]
    assert f"{first:.3f} -> {small['avg_at_2']:.3f}" in shown[shown.index("first and last evaluation") :]


def test_tables_in_tensorboard(finished: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    events = EventAccumulator(str(finished[0]), size_guidance={"tensors": 0}).Reload()
    for tag, rows, columns in (("evaluation", 3, 10), ("breakdown", 5, 11)):
        found = events.Tensors(f"{tag}/text_summary")
        assert [event.step for event in found] == [0, 1, 2]
        text = found[-1].tensor_proto.string_val[0].decode()
        shown = markdown_to_safe_html(text)
        body = shown[shown.index("<tbody>") :]
        assert (body.count("<tr>"), body.count("<td>")) == (rows, rows * columns), shown
        assert shown.strip().endswith("</table>")
    assert [tag for tag in events.Tags()["scalars"] if "level" in tag] == []


# -- repeated evaluations ------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, str]:
    """Returns the text of every file, without the seconds that an evaluation took."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json*")}
    for name, text in found.items():
        if name.endswith("results.json"):
            found[name] = "\n".join(line for line in text.splitlines() if '"seconds"' not in line)
    return found


@pytest.mark.slow
def test_a_crash_and_a_resumption_write_everything_once(
    command: list[str | Path], finished: tuple[Path, str], tmp_path: Path
) -> None:
    """The run is killed after the evaluation of iteration 1, before its checkpoint. This evaluation is made twice."""
    dies = ["--trainer.callbacks+", "helpers.tiny_models.KillAt", "--trainer.callbacks.iteration", "2"]
    dies += ["--trainer.callbacks.minibatch", "0", "--checkpoint.every_n_epochs", "2"]
    assert popo_process(*command, *dies, "--run.folder", tmp_path).returncode < 0
    folder = tmp_path / "evaluations" / "iteration-000001"
    (folder / "small.jsonl").write_text("of the killed run\n" + (folder / "small.jsonl").read_text())
    (folder / "small.jsonl.draft").write_text("half a li")
    popo(*command, "--run.folder", tmp_path, "--run.resume", "true")
    assert written(tmp_path / "evaluations") == written(finished[0] / "evaluations")


# -- validate, test, predict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [0, 2])
def test_validate_finds_what_training_found(
    iteration: int, policy: Path, config: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Base model by folder and last policy by checkpoint, in the shell: all bits and characters agree."""
    weights = ["--model.warm_start", "null", "--model.path", str(policy)]
    if iteration:
        (last,) = (finished[0] / "checkpoints").glob("iteration-0002.ckpt")
        weights = ["--ckpt_path", str(last)]
    done = popo_process("validate", "--config", config, *weights, "--trainer.default_root_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    there, here = finished[0] / "evaluations" / f"iteration-{iteration:06d}", tmp_path / "evaluations" / "validate"
    assert {p.name for p in here.iterdir()} == {"results.json", *FILES.values()}
    for file in FILES.values():
        assert (here / file).read_bytes() == (there / file).read_bytes()
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (here, there))
    for name in KS:
        for key in ("numbers", "breakdown", "settings"):
            assert mine["benchmarks"][name][key] == theirs["benchmarks"][name][key]
    assert mine["mean"] == theirs["mean"] and mine["iteration"] == iteration
    assert mine["checkpoint"] == (weights[1] if iteration else None) and theirs["checkpoint"] is None
    assert mine["benchmarks"][LARGE]["settings"] == {
        "samples": 4,
        "avg_k": 2,
        "pass_k": [2],
        "greedy": True,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 4,
        "limit": 4,
    }
    for name in (f"evaluation after iteration {iteration}", "mean", "by part", str(here)):
        assert name in done.stderr
    assert "first and last" not in done.stderr


def test_validate_reads_no_training_set(policy: Path, tmp_path: Path) -> None:
    config = two_benchmarks(tmp_path / "c.yaml", "NoTrainingSet")
    cli = popo("test", "--config", config, "--run.folder", tmp_path / "runs")
    assert f"eval/{SMALL}/greedy" in cli.trainer.callback_metrics
    assert (tmp_path / "runs" / "evaluations" / "test" / "results.json").exists()


def test_predict_writes_each_response_once(config: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    (last,) = (finished[0] / "checkpoints").glob("iteration-0002.ckpt")
    for _ in range(2):
        popo("predict", "--config", config, "--run.folder", tmp_path, "--ckpt_path", last)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    evaluated = rows_of(finished[0] / "evaluations" / "iteration-000002")
    assert rows == [row for name in KS for row in evaluated[name] if not row["greedy"]]
    popo("predict", "--config", two_benchmarks(tmp_path / "c.yaml", samples=0, benchmarks={}), "--run.folder", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["greedy"] for row in rows)


@pytest.mark.parametrize("new_draws", [False, True])
def test_a_policy_that_does_not_change_answers_alike_unless_draws_are_new(
    new_draws: bool, policy: Path, tmp_path: Path
) -> None:
    evaluation = Evaluation(1, samples=4, pass_k=4, greedy=False, new_draws=new_draws)
    fit(policy, tmp_path, lr=0.0, iterations=2, callbacks=[evaluation])
    answers = [(tmp_path / "evaluations" / f"iteration-00000{i}" / "countdown.jsonl").read_bytes() for i in (0, 1, 2)]
    assert len(set(answers)) == (3 if new_draws else 1)


def test_responses_need_not_be_written(policy: Path, tmp_path: Path) -> None:
    config = two_benchmarks(tmp_path / "c.yaml", write_samples=False, breakdown=["kind"], benchmarks={})
    popo("validate", "--config", config, "--run.folder", tmp_path)
    assert [path.name for path in (tmp_path / "evaluations" / "validate").iterdir()] == ["results.json"]
    results = json.loads((tmp_path / "evaluations" / "validate" / "results.json").read_text())
    assert list(results["benchmarks"][SMALL]["breakdown"]) == ["kind"]
    assert list(results["benchmarks"][SMALL]["breakdown"]["kind"]) == ['["a", 0]', '["a", 1]']


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("TwoBenchmarks", ["--evaluation.benchmarks", "{smal: {samples: 4}}"], ["'smal'", "small, large/"]),
        ("TwoBenchmarks", ["--evaluation.benchmarks", "{small: {sample: 4}}"], ["'sample'; did you mean samples?"]),
        ("TwoBenchmarks", ["--evaluation.benchmarks.small", "{samples: 1}"], ["evaluation.benchmarks.small.avg_k"]),
        ("TwoBenchmarks", ["--evaluation.breakdown", "[levle]"], ["'levle'", "kind, level, subject"]),
        ("CalledMean", ["--evaluation.benchmarks", "null"], ["'mean'", "rename"]),
    ],
)
def test_settings_for_what_is_not_there_are_refused(
    task: str,
    arguments: list[str],
    words: list[str],
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("validate", "--config", two_benchmarks(tmp_path / "c.yaml", task), *arguments)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("popo: ") and all(word in sentence for word in words), sentence


@pytest.mark.slow
def test_two_ranks_share_a_benchmark(policy: Path, config: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    """The ranks' files together cover the benchmark. Slices without a problem on one rank still add up."""
    ranks = ["--trainer.strategy", "ddp", "--trainer.default_root_dir", tmp_path]
    said = one_node(2, "validate", "--config", config, *ranks, seconds=150)
    folder, one = tmp_path / "evaluations" / "validate", finished[0] / "evaluations" / "iteration-000000"
    results, alone = (json.loads((each / "results.json").read_text())["benchmarks"] for each in (folder, one))
    for name, file in FILES.items():
        parts = [folder / file.replace(".jsonl", f".rank{rank}-of-2.jsonl") for rank in range(2)]
        rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        assert results[name]["numbers"] == pytest.approx(counted(rows, *KS[name]))
        assert results[name]["numbers"]["greedy"] == alone[name]["numbers"]["greedy"]
        assert results[name]["numbers"]["problems"] == alone[name]["numbers"]["problems"]
        for field, values in results[name]["breakdown"].items():
            for value, numbers in values.items():
                own = [row for row in rows if value == ("(none)" if row[field] is None else str(row[field]))]
                assert numbers == pytest.approx(counted(own, *KS[name]))
    assert said.count("evaluation after iteration 0") == 1
