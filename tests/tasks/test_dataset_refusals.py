"""What a dataset task omits or refuses, and its messages."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset import ROW, png, task, write
from helpers.places import REPOSITORY, TESTS

from popo_lightning.core.errors import SettingError
from popo_lightning.tasks.sources import MAX_ROW_BYTES


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


DEEP = b'{"prompt": "x", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD: dict[str, tuple[Any, list[str]]] = {  # a row, words of its sentence
    "no JSON": (b'{"prompt": "x", "answer"', ["JSON"]),
    "no UTF-8": (b'{"prompt": "\xff", "answer": "1"}', ["utf-8"]),
    "deep": (DEEP, ["JSON"]),
    "deeper": (b"[" * 1_000_000, ["JSON"]),
    "not a number": (b'{"prompt": "x", "answer": NaN}', ["NaN"]),
    "infinite": (b'{"prompt": "x", "answer": -Infinity}', ["Infinity"]),
    "overflow": (b'{"prompt": "x", "answer": 1e999}', ["'answer'", "plain JSON"]),
    "huge number": (b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}", ["JSON"]),
    "huge row": (b'{"prompt": "' + b"x" * 10_000_000 + b'", "answer": "1"}', ["4 MiB"]),
    "long prompt": ({"prompt": "x" * 1_000_001, "answer": "1"}, ["'prompt'", "1000000 characters"]),
    "list": ([1, 2], ["list", "columns"]),
    "text": ("prompt", ["str", "columns"]),
    "null": (None, ["NoneType", "columns"]),
    "no prompt": ({"answer": "1"}, ["'prompt'", "fill it in"]),
    "no answer": ({"prompt": "x", "answer": None}, ["'answer'", "fill it in"]),
    "blank prompt": ({"prompt": " \n", "answer": "1"}, ["empty 'prompt'"]),
    "blank answer": ({"prompt": "x", "answer": " "}, ["empty 'answer'"]),
    "prompt of a wrong type": ({"prompt": {"a": 1}, "answer": "1"}, ["dict", "'prompt'"]),
    "prompt of true": ({"prompt": True, "answer": "1"}, ["bool", "'prompt'"]),
    "messages of a wrong type": ({"prompt": [{"role": "user", "content": ["x"]}], "answer": "1"}, ["messages"]),
    "messages of a wrong role": ({"prompt": [{"role": "tool", "content": "x"}], "answer": "1"}, ["messages"]),
    "no question": ({"prompt": [{"role": "system", "content": "x"}], "answer": "1"}, ["user"]),
    "no messages": ({"prompt": [], "answer": "1"}, ["user"]),
    "surrogate": (b'{"prompt": "\\ud800", "answer": "1"}', ["'prompt'", "surrogate"]),
    "surrogate in the answer": (b'{"prompt": "x", "answer": ["\\ud800"]}', ["'answer'", "plain JSON"]),
    "id of a wrong type": ({"id": {}, "prompt": "x", "answer": "1"}, ["dict", "'id'"]),
    "same id": ({"id": "good", "prompt": "x", "answer": "1"}, ["'good'", "row 1"]),
    "level that is no JSON": (b'{"prompt": "x", "answer": "1", "level": 1e999}', ["'level'"]),
    "mark without image": ({"prompt": "<image>x", "answer": "1"}, ["1 <image> marks", "0 images"]),
    "image without mark": ({"prompt": "x", "answer": "1", "images": ["good.png"]}, ["0 <image> marks", "1 images"]),
    "no such image": ({"prompt": "<image>", "answer": "1", "images": ["gone.png"]}, ["gone.png", "no such file"]),
    "image of a wrong type": ({"prompt": "<image>", "answer": "1", "images": [7]}, ["image", "path"]),
    "image with an odd name": ({"prompt": "<image>", "answer": "1", "images": ["a\0b"]}, ["no such file"]),
    "image with a long name": ({"prompt": "<image>", "answer": "1", "images": ["a" * 5000]}, ["no such file"]),
    "image that is a folder": ({"prompt": "<image>", "answer": "1", "images": "."}, ["no such file"]),
    "broken image": ({"prompt": "<image>", "answer": "1", "images": ["broken.png"]}, ["broken.png", "readable"]),
    "image of another kind": ({"prompt": "<image>", "answer": "1", "images": ["scan.tiff"]}, ["readable", "PNG"]),
    "huge image": ({"prompt": "<image>", "answer": "1", "images": ["huge.png"]}, ["pixels", "scale"]),
    "image that is a bomb": ({"prompt": "<image>", "answer": "1", "images": ["bomb.png"]}, ["readable"]),
}


def broken_header(width: int, height: int) -> bytes:
    """Returns a PNG header that claims a size."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = png()[33:]
    return png()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + rest


@pytest.mark.parametrize("case", BAD)
def test_bad_row(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row, words = BAD[case]
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:20])
    (tmp_path / "scan.tiff").write_bytes(png(kind="TIFF"))
    (tmp_path / "huge.png").write_bytes(broken_header(8000, 8000))
    (tmp_path / "bomb.png").write_bytes(broken_header(60000, 60000))
    good = {"id": "good", "prompt": "<image>", "answer": "1", "images": ["good.png"]}
    path = write(tmp_path / "rows.jsonl", good, row, ROW)
    found = task(path)
    with caplog.at_level(logging.WARNING):
        assert [problem.id for problem in found.train_problems()] == ["good", "train-3"]
    (bad,) = found.bad_rows()
    assert (bad.source, bad.row) == (str(path), 2)
    print(bad)
    for word in words:
        assert word in bad.reason
    assert len(str(bad)) < 600 + len(str(tmp_path)) and "\n" not in str(bad)
    assert "1 of 3 rows of data.task.train are left out" in caplog.text and str(bad) in caplog.text
    with pytest.raises(SettingError) as stopped:
        task(path, strict=True).train_problems()
    assert str(bad) in str(stopped.value) and "1 of 3 rows" in str(stopped.value)


def test_many_bad_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, *[{"prompt": "x", "answer": ""}] * 20)
    found = task(path, benchmarks={"held": {"path": str(path)}})
    with caplog.at_level(logging.WARNING):
        found.train_problems()
        assert len(found.bad_rows()) == 20 and len(caplog.messages) == 7 and "15 more" in caplog.messages[-1]
        found.benchmarks()
    assert len(found.bad_rows()) == 40
    with pytest.raises(SettingError, match=r"20 of 21 rows of data\.task\.benchmarks\.held are bad"):
        task(path, strict=True, benchmarks={"held": {"path": str(path)}}).benchmarks()


def test_a_row_of_just_the_limit(tmp_path: Path) -> None:
    start, end = b'{"answer": "1", "prompt": "a", "more": "', b'"}'
    filler = b"x" * (MAX_ROW_BYTES - len(start) - len(end))
    path = write(tmp_path / "rows.jsonl", start + filler + end, start + filler + b"x" * 9 + end, ROW)
    assert [p.id for p in task(path).train_problems()] == ["train-1", "train-3"]
    path.write_bytes(path.read_bytes() + b"x" * (2 * MAX_ROW_BYTES))  # without an end of line
    assert [row.row for row in (lambda t: (t.train_problems(), t.bad_rows())[1])(task(path))] == [2, 4]


def test_refused_settings(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", ROW))
    write(tmp_path / "rows.csv", ROW)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "noise.json").write_text("[1, ")
    (tmp_path / "nothing").mkdir()
    all_bad = write(tmp_path / "bad.jsonl", {"prompt": "", "answer": "1"}, b"x")
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([], {}, r"data\.task\.train is empty"),
        ([path], {"template": "Solve it."}, r"data\.task\.template is 'Solve it\.'.*\{prompt\}"),
        ([path], {"template": "{prompt} {answer}"}, "gold answer away"),
        ([path], {"template": "{prompt} {hint}"}, r"data\.task\.template asks for the column 'hint'.*answer, prompt"),
        (
            [{"path": path, "columns": {"prompt": "q"}}],
            {},
            r"data\.task\.train\[0\]\.columns\.prompt.*'q'.*answer, pro",
        ),
        ([{"path": path, "columns": {"level": "h"}}], {}, r"data\.task\.train\[0\]\.columns\.level.*'h'"),
        ([{"path": path, "columns": {"answer": {"n": "nums"}}}], {}, r"columns\.answer asks for the column 'nums'"),
        (
            [{"path": path, "columns": {"prompt": "q"}}],
            {"template": "{answers}"},
            r"columns\.prompt is 'q'.*no \{prompt",
        ),
        ([path], {"chat": False, "system": "s"}, r"data\.task\.system is 's' but data\.task\.chat is false"),
        ([path], {"chat": False, "response_prefix": "p"}, r"data\.task\.response_prefix is 'p'"),
        ([{"path": path, "split": "test"}], {}, r"data\.task\.train\[0\]\.split is 'test'.*is a file"),
        ([{"path": path, "config": "main"}], {}, r"data\.task\.train\[0\]\.config is 'main'"),
        ([{"path": path, "skip": -1}], {}, r"data\.task\.train\[0\] has skip -1"),
        ([{"path": path, "limit": 0}], {}, "limit 0"),
        ([{"path": path, "skip": 5}], {}, r"data\.task\.train\[0\] is '.*' with skip 5, which gives no row"),
        ([tmp_path / "empty.jsonl"], {}, "gives no row"),
        (
            [{"path": "gone.jsonl"}],
            {"folder": str(tmp_path)},
            rf"'gone\.jsonl'.*{tmp_path}/gone\.jsonl.*data\.task\.fol",
        ),
        ([{"path": "*.nope"}], {"folder": str(tmp_path)}, r"'\*\.nope', which matches no file"),
        ([{"path": "rows.csv"}], {"folder": str(tmp_path)}, r"rows\.csv is none of \.jsonl"),
        ([{"path": "a/b/c"}], {}, "neither a file, a folder nor"),
        ([tmp_path / "noise.parquet"], {}, "no readable parquet"),
        ([tmp_path / "noise.json"], {}, r"noise\.json, a JSON array that cannot be read"),
        ([{"path": "nothing"}], {"folder": str(tmp_path)}, "is path 'nothing', which cannot be loaded"),
        ([all_bad], {}, r"data\.task\.train gives no problem out of 2 rows: row 1 of .* empty 'prompt'"),
    ]
    for sources, settings, words in cases:
        with pytest.raises(SettingError, match=words) as stopped:
            task(*sources, **settings).train_problems()
        print(stopped.value)
        assert "\n" not in str(stopped.value)
    with pytest.raises(SettingError, match=r"data\.task\.benchmarks\.held\.columns\.prompt"):
        task(path, benchmarks={"held": {"path": path, "columns": {"prompt": "q"}}}).benchmarks()


def test_hub_out_of_reach(tmp_path: Path) -> None:
    code = (
        "from helpers.verifiers import AcceptsAll\nfrom popo_lightning.tasks.dataset import DatasetTask\n"
        "DatasetTask(AcceptsAll(), [{'path': 'nobody/nothing', 'split': 'test'}], {}).train_problems()"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": f"{REPOSITORY}:{TESTS}"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    last = ended.stderr.rstrip().splitlines()[-1]
    assert ended.returncode == 1 and "SettingError: data.task.train[0] is path 'nobody/nothing', split 'test'" in last
    assert "_local.yaml" in last and "data.task.folder" in last and "HF_HOME" in last


def test_without_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    for path in ("openai/gsm8k", str(tmp_path / "rows.parquet")):
        with pytest.raises(SettingError, match=f"{path}', which needs the datasets library; pip install datasets"):
            task({"path": path}).train_problems()
    assert task(write(tmp_path / "rows.jsonl", ROW)).train_problems()
