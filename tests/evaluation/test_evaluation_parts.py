"""Parts of an evaluation without a model: settings, means, tables and files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from popo_lightning.callbacks.summary import flatten_evaluation
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.whole_files import replaced
from popo_lightning.core.work import Work
from popo_lightning.engines.base import Sampling
from popo_lightning.evaluation.benchmarks import BenchmarkSettings, EvalSettings, a_part, seed_of_draws
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.evaluation.files import rank_file, sample_rows, to_json, write_rows
from popo_lightning.evaluation.results import BenchmarkResult, EvaluationResult, in_order
from popo_lightning.evaluation.tables import benchmark_table, breakdown_table, change_table

NASTY = [
    "plain",
    "a | b || c",
    "`code` ``` fence",
    "two\n\nlines | x",
    "\r\r\n\x0b\x0c\x85\u2028\u2029x",
    "[bold red]x[/] [/nothing]",
    "\x1b[2J\x1b]0;title\x07",
    "lone \ud800 \udfff surrogates",
    "<script>alert(1)</script> ![y](http://z)",
    "nul \0 and \\ and \\|",
    "長い" * 500,
    "",
]


def group_of(name: str, text: str, info: dict[str, Any] | None = None, failure: str | None = None) -> Group:
    answer = Response(torch.tensor([1, 2]), torch.zeros(2), "stop", text, {"score": 0.5, "acc": 1.0}, failure)
    return Group(0, Problem(name, text, {"gold": text}, info or {}), torch.tensor([1]), [answer], 0)


@pytest.mark.parametrize("text", NASTY)
def test_hostile_text_is_written_and_shown(text: str, tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    group = group_of(text, text, {"level": text, "subject": math.nan})
    with replaced(tmp_path / "x.jsonl") as file:
        write_rows(file, sample_rows(text, [group], [group], ["kind"]))
    lines = (tmp_path / "x.jsonl").read_bytes().splitlines()  # a line contains no separator of any kind
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [row["greedy"] for row in rows] == [True, False]
    for row in rows:
        assert row["response"] == row["problem"] == row["prompt"] == row["answer"]["gold"] == row["level"] == text
        assert row["benchmark"] == text and row["subject"] == "nan" and row["kind"] is None

    settings = EvalSettings(1, 1, (1,), True, 1.0, 1.0, 0, 9, 0)
    numbers = {"problems": 1.0, "greedy": 0.25, "avg_at_1": 0.5, "pass_at_1": 0.5, "grading_failures": 1.0}
    of = [
        BenchmarkResult(name, settings, numbers, {"level": {text: numbers, "2": numbers}}, 0.0) for name in (text, "b")
    ]
    result = EvaluationResult(1, of)
    parts = breakdown_table(result)
    assert parts is not None
    for table, lines_of_it in ((benchmark_table(result, text), 3), (parts, 4)):
        screen = Console(file=io.StringIO(), width=300, color_system=None, highlight=False)
        screen.print(table.for_terminal())
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
        assert shown.encode() and shown.count("0.250") == lines_of_it
        assert sum("0.250" in line for line in shown.splitlines()) == lines_of_it
        assert not any(character in shown for character in "\x1b\x07\r\x0b\x85")
        html = markdown_to_safe_html(table.markdown())
        if text == "a | b || c":  # for renderers in which a bar in code ends a cell
            assert "`a \\| b \\|\\| c`" in table.markdown()
        assert html.count("<tr>") == lines_of_it + 1 and html.strip().endswith("</table>")
        assert html.count("<td>") == lines_of_it * len(table.header)
        assert not any(tag in html for tag in ("<script", "<img"))


def test_image_bytes_are_not_written() -> None:
    image = b"\x89PNG" + bytes(5000)
    problem = Problem("p", [{"role": "user", "content": "<image>"}], "1", {"level": image}, (image, "a.png"))
    group = Group(0, problem, torch.tensor([1]), group_of("p", "x").responses, 0)
    text = to_json(next(sample_rows("b", [group], [], [])))
    assert len(text) < 500 and json.loads(text)["images"] == ["(5004 bytes)", "a.png"]


def test_numbers_come_before_words() -> None:
    values = ["geometry", "10", "(none)", "9.5", "nan", "2", "Algebra", "inf", "2"]
    expected = ["2", "9.5", "10", "Algebra", "geometry", "inf", "nan", "(none)"]
    assert in_order(values) == in_order(reversed(values)) == expected


# -- files -------------------------------------------------------------------------------------------------------------


def test_half_a_file_never_takes_the_place_of_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.jsonl"
    path.parent.mkdir()
    (path.parent / "x.jsonl.draft").write_text("of a process that was killed")
    with replaced(path) as file:
        write_rows(file, [{"a": 1}])
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        write_rows(file, [{"a": 2}])
        assert path.read_text() == '{"a": 1}\n'
        _ = 1 / 0
    assert path.read_text() == '{"a": 1}\n' and [each.name for each in path.parent.iterdir()] == ["x.jsonl"]


def test_a_predict_that_fails_keeps_earlier_responses(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text("earlier\n")
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), global_rank=0, world_size=1)
    module: Any = None
    evaluation = Evaluation()
    evaluation.on_predict_start(trainer, module)
    assert evaluation._responses is not None
    write_rows(evaluation._responses, [{"a": 1}])
    evaluation.on_exception(trainer, module, KeyboardInterrupt())
    assert (tmp_path / "responses.jsonl").read_text() == "earlier\n" and len(list(tmp_path.iterdir())) == 1
    evaluation.on_exception(trainer, module, KeyboardInterrupt())  # there is nothing left to keep


def test_files_of_another_number_of_ranks_go(tmp_path: Path) -> None:
    names = ["a.jsonl", "a.rank0-of-2.jsonl", "a.rank1-of-2.jsonl", "a.rank2-of-3.jsonl", "ab.jsonl", "a.jsonl.draft"]
    for name in names:
        (tmp_path / name).touch()
    assert rank_file(tmp_path, "a", 1, 2).name == "a.rank1-of-2.jsonl"
    assert len(list(tmp_path.iterdir())) == len(names), "one rank does this, the first"
    assert rank_file(tmp_path, "a", 0, 2).name == "a.rank0-of-2.jsonl"
    assert {path.name for path in tmp_path.iterdir()} == {*names} - {"a.jsonl", "a.rank2-of-3.jsonl"}
    assert rank_file(tmp_path, "a", 0, 1).name == "a.jsonl"
    assert {path.name for path in tmp_path.iterdir()} == {"ab.jsonl", "a.jsonl.draft"}
    assert rank_file(tmp_path, "../a/b", 0, 1).parent == tmp_path


# -- settings ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "k": ({"pass_k": [1, 9]}, ["evaluation.pass_k is 1, 9", "evaluation.samples is 8"]),
    "both k at once": (
        {"samples": 2},
        [
            "evaluation.avg_k is 4 and evaluation.pass_k is 8, but evaluation.samples is 2",
            "such as --evaluation.avg_k 2 --evaluation.pass_k 2",
        ],
    ),
    "no k": ({"pass_k": []}, ["evaluation.pass_k is empty"]),
    "avg_k": ({"avg_k": 0}, ["evaluation.avg_k is 0"]),
    "nothing": ({"samples": 0, "greedy": False}, ["evaluation.samples", "evaluation.greedy"]),
    "every": ({"every_n_iterations": -1}, ["evaluation.every_n_iterations is -1"]),
    "temperature": ({"temperature": -0.1}, ["evaluation.temperature is -0.1"]),
    "nan": ({"temperature": math.nan}, ["evaluation.temperature is nan"]),
    "top_p": ({"top_p": 0.0}, ["evaluation.top_p is 0.0"]),
    "top_k": ({"top_k": -1}, ["evaluation.top_k is -1"]),
    "limit": ({"limit": -1}, ["evaluation.limit is -1"]),
    "tokens": ({"max_new_tokens": 0}, ["evaluation.max_new_tokens is 0"]),
    "inherited k": (
        {"benchmarks": {"x": BenchmarkSettings(samples=4)}},
        ["evaluation.benchmarks.x.pass_k is 8", "evaluation.benchmarks.x.samples is 4"],
    ),
    "own k": ({"benchmarks": {"x": BenchmarkSettings(avg_k=99)}}, ["evaluation.benchmarks.x.avg_k is 99"]),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_settings_are_refused(case: str) -> None:
    settings, words = BAD[case]
    with pytest.raises(SettingError) as refused:
        Evaluation(**settings)
    assert all(word in str(refused.value) for word in words), refused.value


def test_what_is_not_set_falls_back() -> None:
    own = {"x": BenchmarkSettings(samples=16, pass_k=[16, 1, 16], greedy=False, temperature=0.0, limit=3)}
    evaluation = Evaluation(temperature=0.6, top_p=0.9, max_new_tokens=7, limit=5, benchmarks=own)
    assert evaluation.settings_of("y") == EvalSettings(8, 4, (8,), True, 0.6, 0.9, 0, 7, 5)
    assert evaluation.settings_of("x") == EvalSettings(16, 4, (1, 16), False, 0.0, 0.9, 0, 7, 3)
    assert evaluation.settings_of("x").changed(BenchmarkSettings(limit=0)).limit == 0
    Evaluation(samples=0, avg_k=99)  # without samples, avg_k may be any number


def test_a_limit_takes_the_same_problems_in_their_order() -> None:
    problems = [Problem(str(i), "", None) for i in range(50)]
    few, more = (EvalSettings(1, 1, (1,), True, 1.0, 1.0, 0, 9, limit).chosen(problems) for limit in (10, 30))
    places = [int(problem.id) for problem in few]
    assert len(set(places)) == 10 and places == sorted(places) and places != list(range(10))
    assert {problem.id for problem in few} < {problem.id for problem in more} and len(more) == 30
    assert EvalSettings(1, 1, (1,), True, 1.0, 1.0, 0, 9, 50).chosen(problems) is problems


# -- means ---------------------------------------------------------------------------------------------------------


def result_of(avg_k: int, pass_k: tuple[int, ...], samples: int = 8, **numbers: float) -> BenchmarkResult:
    settings = EvalSettings(samples, avg_k, pass_k, "greedy" in numbers, 1.0, 1.0, 0, 9, 0)
    return BenchmarkResult(f"b{avg_k}-{samples}", settings, numbers, {}, 1.0)


def test_means_over_benchmarks() -> None:
    one = result_of(4, (1, 8), greedy=0.2, avg_at_4=0.1, pass_at_1=0.1, pass_at_8=0.5)
    other = result_of(2, (8,), greedy=0.4, avg_at_2=0.3, pass_at_8=0.7)
    both = EvaluationResult(3, [one, other])
    assert both.mean == pytest.approx({"greedy": 0.3, "avg": 0.2, "pass_at_8": 0.6})
    assert benchmark_table(both, "t").header == ["benchmark", "greedy", "avg", "avg@2", "avg@4", "pass@1", "pass@8"]
    assert benchmark_table(both, "t").rows[-1] == ["mean", "0.300", "0.200", "", "", "", "0.600"]
    assert EvaluationResult(3, [one]).mean == {}
    same = EvaluationResult(3, [one, result_of(4, (8,), 16, avg_at_4=0.5, pass_at_8=0.5)])
    assert same.mean == pytest.approx({"avg_at_4": 0.3, "pass_at_8": 0.5})
    assert EvaluationResult(3, [one, result_of(2, (8,), 0, greedy=0.4)]).mean == pytest.approx({"greedy": 0.3})

    entry = {"iteration": 3} | both.metrics()
    expected = {"iteration": 3, "avg_k": None, "pass_k": 8, "greedy": 0.3, "avg_at_k": 0.2, "pass_at_k": 0.6}
    assert flatten_evaluation(entry) == pytest.approx(expected)
    mixed = EvaluationResult(3, [one, result_of(4, (1, 16), 16, avg_at_4=0.3, pass_at_1=0.3, pass_at_16=0.9)])
    assert mixed.mean == pytest.approx({"avg_at_4": 0.2, "pass_at_1": 0.2})
    assert flatten_evaluation({"iteration": 3} | mixed.metrics())["pass_at_k"] == pytest.approx(
        0.7
    )  # the largest k of each
    first = {"iteration": 0, "eval/b4-8/greedy": 0.1}
    table = change_table(first, entry)
    assert table.rows[0][:2] == ["b4-8", "0.100 -> 0.200"] and table.rows[1][:2] == ["b2-8", "0.400"]
    assert table.rows[-1][0] == "mean"


def test_draws_are_the_same_every_time_and_of_one_benchmark_alone() -> None:
    """Seeds depend on benchmark and rank, so the same problem in two benchmarks gets different noise."""
    seeds: list[int] = []

    def sample(problems: Any, n: int, sampling: Any, seed: int) -> list[Any]:
        seeds.append(seed)
        return []

    data = SimpleNamespace(sample=sample, sampling=Sampling(4), generator=SimpleNamespace(work=Work()))
    evaluation = Evaluation(max_new_tokens=4)
    for rank, name in ((0, "aime"), (0, "amc"), (0, "aime"), (1, "aime")):
        trainer: Any = SimpleNamespace(global_rank=rank, datamodule=data)
        evaluation._sample(trainer, name, [], 1, evaluation.settings)
    assert seeds[0] == seeds[2] and len(set(seeds)) == 3


def test_kept_responses_have_what_an_estimate_reads() -> None:
    """Sampled responses of the chosen problem have tokens and log-probs bit for bit, and its prompt's tokens once.

    Greedy responses and other problems have none of these.
    """
    logp = torch.tensor([-0.1, -1e-9, -12.345678])
    answers = [Response(torch.tensor([5, 6, 7]), logp, "stop", "x", {"score": 1.0, "acc": 1.0})] * 2
    groups = [Group(0, Problem(name, name, 1), torch.tensor([3, 4]), answers, 0) for name in ("a", "b")]
    rows = [json.loads(to_json(row)) for row in sample_rows("b", groups, groups, (), {"b"})]
    kept = [row for row in rows if "token_ids" in row]
    assert [(row["problem"], row["greedy"], row["sample"]) for row in kept] == [("b", False, 0), ("b", False, 1)]
    assert [row.get("prompt_ids") for row in kept] == [[3, 4], None]
    for row in kept:
        assert row["token_ids"] == [5, 6, 7]
        assert torch.equal(torch.tensor(row["behave_logp"]), logp)
    assert not any("prompt_ids" in row for row in rows if row not in kept)


def test_responses_that_are_kept_are_a_fixed_part() -> None:
    problems = [Problem(str(place), "", 0) for place in range(40)]
    kept = {n: {problem.id for problem in a_part(problems, n)} for n in (0, 3, 10, 40, 99)}
    assert [len(found) for found in kept.values()] == [0, 3, 10, 40, 40]
    assert kept[3] < kept[10] < kept[40] == {problem.id for problem in problems}
    with pytest.raises(SettingError, match="keep_responses is -1; it must be"):
        Evaluation(keep_responses=-1)
    with pytest.raises(SettingError, match="write_samples"):
        Evaluation(keep_responses=1, write_samples=False)


def test_draws_have_a_seed_by_rank_benchmark_and_where_asked_iteration() -> None:
    places = [
        (0, 0, "a", None),
        (1, 0, "a", None),
        (0, 1, "a", None),
        (0, 0, "b", None),
        (0, 0, "a", 1),
        (0, 0, "a", 2),
    ]
    assert len({seed_of_draws(*place) for place in places}) == len(places)
    assert seed_of_draws(0, 0, "a", 1) == seed_of_draws(0, 0, "a", 1)
