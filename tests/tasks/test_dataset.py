"""Problems from files and data sets: what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.dataset import ROW, png, task, write
from helpers.tiny_models import fit, tiny_task
from helpers.verifiers import Steps

from popo_lightning.core.errors import SettingError
from popo_lightning.tasks.template import NEXT_QUESTION, Template


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_plain_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": r"Is $\frac{1}{2}$ {prompt} {answer}?", "answer": " 1 ", "level": 3, "subject": "sums"},
        {"id": 7, "prompt": "b", "answer": 27.0, "level": None},
        {"prompt": "c", "answer": 5, "images": None},
        {"prompt": "d", "answer": ["x", "y"], "images": []},
    ]
    problems = task(write(tmp_path / "rows.jsonl", *rows)).train_problems()
    assert [p.id for p in problems] == ["a", "7", "train-3", "train-4"]
    assert [p.answer for p in problems] == ["1", "27", "5", ["x", "y"]]
    assert problems[0].prompt == [{"role": "user", "content": r"Is $\frac{1}{2}$ {prompt} {answer}?"}]
    assert [p.info for p in problems] == [{"level": 3, "subject": "sums"}, {}, {}, {}]


def test_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROW)
    (problem,) = task(
        path, system="Be brief.", template="{prompt}\n\nUse \\boxed{}.", response_prefix="<think>"
    ).train_problems()
    assert problem.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1+1?\n\nUse \\boxed{}."},
        {"role": "assistant", "content": "<think>"},
    ]
    assert problem.response_prefix == "<think>"
    (plain,) = task(path, chat=False, template="Q: {prompt}\nA:").train_problems()
    assert plain.prompt == "Q: What is 1+1?\nA:"
    assert task(path).stop == () and task(path, chat=False).stop == NEXT_QUESTION
    assert task(path, chat=False, template="Sum: {prompt}").stop == (*NEXT_QUESTION, "\nSum:")


def test_chat_messages_as_prompt(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "theirs"},
        {"role": "user", "content": "first {prompt}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "last"},
        {"role": "assistant", "content": "So"},
    ]
    path = write(tmp_path / "rows.jsonl", {"prompt": messages, "reward_model": {"ground_truth": "4"}})
    source = {"path": str(path), "columns": {"answer": "reward_model.ground_truth"}}
    (problem,) = task(source).train_problems()
    assert (problem.prompt, problem.answer, problem.response_prefix) == (messages, "4", "So")
    (problem,) = task(source, template="{prompt}!", system="ours", response_prefix="Well").train_problems()
    contents = [message["content"] for message in problem.prompt]  # type: ignore[index]
    assert contents == ["ours", "first {prompt}", "yes", "last!", "Well"]


def test_rows_that_end_with_the_solution_are_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solved = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2, since " + "x" * 200}]
    path = write(tmp_path / "rows.jsonl", {"prompt": solved, "answer": "2"}, {"prompt": "2+2?", "answer": "4"})
    assert task(path).train_problems()[0].response_prefix
    (record,) = [record for record in caplog.records if "turn of the assistant" in record.getMessage()]
    assert "1 of 2 problems of data.task.train end with" in record.getMessage()
    assert "('It is 2, since xx" in record.getMessage() and len(record.getMessage()) < 300
    caplog.clear()
    for prefix, expected in (("", ""), ("<think>", "<think>")):
        first, second = task(path, response_prefix=prefix).train_problems()
        assert first.response_prefix == second.response_prefix == expected
        assert isinstance(first.prompt, list) and first.prompt[0] == solved[0]
        assert len(first.prompt) == len(second.prompt) == 1 + bool(prefix)
    plain = write(tmp_path / "plain.jsonl", {"prompt": "2+2?", "answer": "4"})
    task(plain).train_problems()
    assert not caplog.records


def test_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {
            "q": "x",
            "final": ["1", "2"],
            "nums": [3, 4],
            "target": 7,
            "a.b": "dotted",
            "meta": {"no": 12, "how": "hard"},
        },
    )
    columns = {"prompt": "q", "answer": "final.0", "id": "meta.no", "level": "meta.how", "subject": "a.b"}
    (problem,) = task({"path": str(path), "columns": columns}).train_problems()
    assert (problem.id, problem.answer, problem.info) == ("12", "1", {"level": "hard", "subject": "dotted"})
    source = {"path": str(path), "columns": {"answer": {"numbers": "nums", "target": "target"}}}
    (problem,) = task(source, template="Make {target} of {numbers} ({meta.how}).").train_problems()
    assert problem.prompt == [{"role": "user", "content": "Make 7 of [3, 4] (hard)."}]
    assert problem.answer == {"numbers": [3, 4], "target": 7}


def test_answers_inside_solutions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "answer": "1 #### 2\n#### 1,234"},
        {"prompt": "b", "answer": "no mark"},
    )
    found = task({"path": str(path), "answer_after": "####"})
    assert [problem.answer for problem in found.train_problems()] == ["1234"]
    assert "####" in found.bad_rows()[0].reason and "answer_after" in found.bad_rows()[0].reason
    path = write(
        tmp_path / "boxed.jsonl",
        {"prompt": "a", "answer": r"$\boxed{1}$ so $\boxed{\frac{1}{2}}$."},
        {"prompt": "b", "answer": "no box"},
    )
    found = task({"path": str(path), "answer_boxed": True})
    assert [problem.answer for problem in found.train_problems()] == [r"\frac{1}{2}"]
    assert r"\boxed" in found.bad_rows()[0].reason


def test_skip_limit_and_several_sources(tmp_path: Path) -> None:
    many = write(tmp_path / "many.jsonl", *[{"prompt": f"p{n}", "answer": "1"} for n in range(10)])
    for name in ("a", "b"):
        write(tmp_path / "parts" / f"{name}.jsonl", {"prompt": name, "answer": "1"})
    found = task(
        {"path": "many.jsonl", "skip": 3, "limit": 2}, {"path": "parts/*.jsonl", "limit": 5}, folder=str(tmp_path)
    )
    assert [p.prompt[0]["content"] for p in found.train_problems()] == ["p3", "p4", "a", "b"]  # type: ignore[index]
    assert [p.id for p in found.train_problems()] == ["train-4", "train-5", "train2-1", "train2-2"]
    assert len(task({"path": str(many), "skip": 8}).train_problems()) == 2


def test_ids_of_benchmarks_do_not_meet(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"id": 0} | ROW, ROW)
    found = task(path, benchmarks={"one": {"path": str(path)}, "two": {"path": str(path)}})
    ids = [p.id for problems in (found.train_problems(), *found.benchmarks().values()) for p in problems]
    assert ids == ["0", "train-2", "one/0", "one/2", "two/0", "two/2"]


def test_json_array_and_bom(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(" \n[" + json.dumps(ROW) + ", 5, " + json.dumps(ROW) + "]")
    found = task(tmp_path / "array.json")
    assert [p.id for p in found.train_problems()] == ["train-1", "train-3"]
    assert [(row.row, "int" in row.reason) for row in found.bad_rows()] == [(2, True)]
    (tmp_path / "lines.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n\n" + json.dumps(ROW).encode()
    )
    assert [p.id for p in task(tmp_path / "lines.json").train_problems()] == ["train-1", "train-2"]


def test_images_in_files(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(png())
    write(tmp_path / "data" / "rows.jsonl", {"prompt": "<image>?", "answer": "1", "images": ["images/a.png"]})
    (problem,) = task("data/rows.jsonl", folder=str(tmp_path)).train_problems()
    assert problem.images == (str(tmp_path / "data" / "images" / "a.png"),)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """Writes a folder laid out as on the hub, with embedded images."""
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "n": datasets.Value("int64"),
        }
    )
    rows = [
        {"images": [{"bytes": png(4 + n), "path": None}], "problem": f"<image>p{n}", "answer": f"{n}", "n": n}
        for n in range(7)
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    data.select([6]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    return tmp_path


def test_embedded_images(hub_folder: Path) -> None:
    columns = {"prompt": "problem"}
    sources = {
        "file": {"path": "hub/data/train-00000-of-00001.parquet", "columns": columns, "skip": 2, "limit": 3},
        "folder": {"path": "hub", "columns": columns, "skip": 2, "limit": 3},
        "saved": {"path": "saved", "columns": columns, "skip": 2, "limit": 3},
    }
    found = task({"path": "hub", "split": "test", "columns": columns}, folder=str(hub_folder), benchmarks=sources)
    assert [p.images for p in found.train_problems()] == [(png(10),)]
    for name, problems in found.benchmarks().items():
        assert [p.images for p in problems] == [(png(6),), (png(7),), (png(8),)], name
        assert [p.id for p in problems] == [f"{name}/{n}" for n in (3, 4, 5)]
        assert [p.answer for p in problems] == ["2", "3", "4"]


def test_image_paths_in_tables(tmp_path: Path) -> None:
    """Paths are relative to the parquet file, or to the folder of the data set."""
    import datasets

    row = {"prompt": "<image>", "answer": "1", "images": "a.png"}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.png").write_bytes(png())
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "hub" / "train.parquet")
    for path in ("hub/train.parquet", "hub"):
        (problem,) = task(path, folder=str(tmp_path)).train_problems()
        assert problem.images == (str(tmp_path / "hub" / "a.png"),)


def test_folder_with_another_split(hub_folder: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.task\.train\[0\] is path 'hub', split 'dev'.*train.*test"):
        task({"path": "hub", "split": "dev"}, folder=str(hub_folder)).train_problems()
    with pytest.raises(SettingError, match=r"path 'saved', split 'dev'.*its splits are train"):
        task({"path": "saved", "split": "dev"}, folder=str(hub_folder)).train_problems()
    with pytest.raises(SettingError, match="path 'hub', config 'hard'"):
        task({"path": "hub", "config": "hard"}, folder=str(hub_folder)).train_problems()


def test_read_once_and_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, {"prompt": "b", "answer": "1"})
    found = task(path, benchmarks={"b": {"path": str(path)}})
    path_of_another = write(tmp_path / "gone.jsonl", ROW)
    lazy = task(path_of_another)
    first, second = found.train_problems(), found.benchmarks()
    path.unlink()
    assert found.train_problems() is first and found.benchmarks() == second
    path_of_another.unlink()
    with pytest.raises(SettingError, match=r"gone\.jsonl"):  # making the task read nothing
        lazy.train_problems()


@pytest.mark.parametrize(
    ("text", "names", "filled"),
    [
        (r"{a}: \boxed{}", ["a"], r"<a>: \boxed{}"),
        (r"\boxed{a} \frac{a}{b} x_{n}^{a} {a}", ["a"], r"\boxed{a} \frac{a}{b} x_{n}^{a} <a>"),
        (r"\boxed{{a}}", ["a"], r"\boxed{<a>}"),
        ("{a}{b.c}{a} {} { a } {1}", ["a", "b.c"], "<a><b.c><a> {} { a } {1}"),
        ("{a.0} %s {{", ["a.0"], "<a.0> %s {{"),
    ],
)
def test_template(text: str, names: list[str], filled: str) -> None:
    assert Template(text).names == names
    assert Template(text).fill(lambda name: f"<{name}>") == filled
    assert Template("{a}").fill(lambda name: r"\1 {a} \g<0>") == r"\1 {a} \g<0>"


def test_trains_as_on_problems_made_in_memory(policy: Path, tmp_path: Path) -> None:
    """The same problems from a file give the same run, bit for bit."""
    embedded = tiny_task()
    rows = [{"id": p.id, "prompt": p.prompt, "answer": p.answer} for p in embedded.train_problems()]
    path = write(tmp_path / "rows.jsonl", *rows)
    found = task(path, verifier=Steps(), chat=False, benchmarks={"held": {"path": str(path), "limit": 4}})
    from_file = fit(policy, tmp_path / "file", task=found, iterations=2)
    in_memory = fit(policy, tmp_path / "memory", iterations=2)
    assert from_file.rows == in_memory.rows and len(from_file.rows) >= 2
    assert all(torch.equal(weight, in_memory.weights[name]) for name, weight in from_file.weights.items())
