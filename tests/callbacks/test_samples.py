"""samples.jsonl has all that a reader needs, and TensorBoard shows it as text."""

from __future__ import annotations

import errno
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.groups import group
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from popo_lightning.callbacks.sample_texts import sample_text
from popo_lightning.callbacks.samples import SampleTable, group_rows
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem

HOSTILE = "</script><img src=x onerror=alert(1)> | `a` \n\n# b"


def asked(place: int, version: int, **problem: Any) -> Group:
    made = group(place, version)
    return replace(made, problem=Problem(**{"id": f"p{place}", "prompt": "2+2=", "answer": {"sum": 4}} | problem))


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


def test_a_row_has_gold_parts_and_origin() -> None:
    rows = list(group_rows(asked(3, 5), list(torch.tensor([-1.0, 1.0])), 7))
    assert [(row["advantage"], row["age"], row["fresh"], row["group"]) for row in rows] == [
        (-1.0, 2, False, rows[0]["group"]),
        (1.0, 2, False, rows[0]["group"]),
    ]
    made = asked(3, 7)
    one_renewed = replace(made, responses=[replace(made.responses[0], version=4), made.responses[1]])
    rows = list(group_rows(one_renewed, [None, torch.tensor([0.0, 0.5])], 7))
    assert [row["age"] for row in rows] == [3, 0] and all(row["fresh"] for row in rows)
    assert [row["advantage"] for row in rows] == [None, 0.25]
    assert rows[0]["answer"] == {"sum": 4} and rows[1]["parts"] == made.responses[1].parts
    assert rows[0]["tokens"] == len(made.responses[0].token_ids) and rows[0]["failure"] is None


def test_a_chat_stays_messages_and_is_cut() -> None:
    chat = [{"role": "system", "content": "s" * 3000}, {"role": "user", "content": [{"type": "text", "text": "t"}]}]
    row = next(group_rows(asked(0, 0, prompt=chat), [None, None], 0))
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert len(row["prompt"][0]["content"]) == 2000 and row["prompt"][1] == chat[1]


def test_the_text_marks_right_and_wrong_and_keeps_hostile_text_in_its_cell() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}]
    made = asked(1, 0, prompt=chat, answer=HOSTILE, id=HOSTILE)
    made = replace(made, responses=[replace(each, text=HOSTILE) for each in made.responses])
    rows = [*group_rows(made, list(torch.tensor([-0.5, 0.5])), 2), *group_rows(asked(2, 2), [None, None], 2)]
    shown = markdown_to_safe_html(sample_text(rows, {rows[0]["group"]: ["samples/image 1"]}))
    assert shown.count("<table>") == 4 and shown.count("✓ right") == 2 and shown.count("✗ wrong") == 2
    assert "1 of 2 right, replayed, 2 versions old" in shown and "1 of 2 right, fresh" in shown
    assert "<code>Be brief.</code>" in shown and "samples/image 1 under Images" in shown and '{"sum": 4}' in shown
    assert not any(tag in shown for tag in ("<img", "<script", "<h1", "<a "))


def test_lines_after_the_checkpoint_are_dropped_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves what was there, and where nothing is dropped nothing is written."""
    file = tmp_path / "samples.jsonl"
    lines = [json.dumps({"iteration": iteration}) + "\n" for iteration in (1, 2, 3)]
    file.write_text("".join(lines) + '{"iterat')
    trainer: Any = SimpleNamespace(
        is_global_zero=True, default_root_dir=str(tmp_path), datamodule=SimpleNamespace(iteration=2)
    )
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
        opened = real(self, mode, *args, **settings)
        if mode == "r":
            return opened
        with opened:
            opened.write('{"i')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(SettingError, match=r"samples\.jsonl cannot be written \(No space left on device\); make room"):
        SampleTable().on_train_start(trainer, None)
    assert file.read_text() == "".join(lines) + '{"iterat' and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(Path, "open", real)
    SampleTable().on_train_start(trainer, None)
    assert file.read_text() == "".join(lines[:2]) and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(Path, "open", full)
    SampleTable().on_train_start(trainer, None)
    assert file.read_text() == "".join(lines[:2])


def test_images_that_are_bytes_lie_beside_the_samples(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.write_bytes(png("blue"))
    made = [asked(0, 0, images=(png("red"), str(there))), asked(1, 0, images=("gone.png",))]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), loggers=[logger])
    module = SimpleNamespace(advantages=lambda batch: list(torch.zeros(4)))
    SampleTable(every_n_iterations=1).on_train_batch_end(trainer, module, {}, Minibatch(made, 0, 0), 0)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    images = {row["problem"]: row["images"] for row in rows}
    assert images["p0"][1] == str(there) and images["p1"] == ["gone.png"]
    assert (tmp_path / images["p0"][0]).read_bytes() == png("red")
    logger.experiment.flush()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    text = board.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "samples/image 1, samples/image 2 under Images" in text
    assert board.Tags()["images"] == ["samples/image 1", "samples/image 2"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_words(number: float, tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), loggers=[])
    module = SimpleNamespace(advantages=lambda batch: [torch.tensor(number)] * 2)
    SampleTable(every_n_iterations=1).on_train_batch_end(trainer, module, {}, Minibatch([asked(0, 0)], 0, 0), 0)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["advantage"] == str(number)
