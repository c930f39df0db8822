"""popo sample asks as the run did, grades with its verifier, and prints so that a terminal shows only text."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import as_shards, greedy_rows, newest, refused, said_by
from helpers.tiny_models import method, popo

from popo_lightning.cli.export.asked_policy import Question, answers
from popo_lightning.cli.export.sample_command import lines
from popo_lightning.cli.export.saved_policy import saved_policy
from popo_lightning.cli.export.visible_text import visible
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.task import Task
from popo_lightning.core.user_question import gold_like
from popo_lightning.tasks.dataset import DatasetTask
from popo_lightning.tasks.regraded import Regraded
from popo_lightning.toys.arithmetic import Arithmetic
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.drawn_geometry import DrawnGeometry
from popo_lightning.verifiers.countdown import CountdownVerifier
from popo_lightning.verifiers.math import MathVerifier


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "run"
    popo("fit", "--config", config, *method("popo"), "--run.folder", folder, "--trainer.max_epochs", 2)
    return folder


def test_the_likeliest_answer_is_that_of_the_last_evaluation(run: Path) -> None:
    """It also works with a checkpoint. The question needs no colon at its end."""
    rows = greedy_rows(run)
    for row, place in zip(rows, [run, newest(run), run, run], strict=False):
        code, out, err = said_by("sample", place, row["problem"], "--temperature", "0", "--n", "3")
        ending = "cut at its limit" if row["finish_reason"] == "length" else "ended by itself"
        assert code == 0, err
        assert out == f"-- answer 1 of 1: {row['tokens']} tokens, {ending}\n{row['response']}\n\n"


def test_shards_sample_what_the_file_does(run: Path, tmp_path: Path) -> None:
    shards = as_shards(newest(run), tmp_path / "shards.ckpt")
    question = Question("8,6>14", n=6, seed=3)
    one, other = (answers(saved_policy(str(place)), question) for place in (run, shards))
    assert [response.text for response in one] == [response.text for response in other]
    assert len(one) == 6 and len({response.text for response in one}) > 1
    again = answers(saved_policy(str(run)), Question("8,6>14", n=6, seed=4))
    assert [response.text for response in one] != [response.text for response in again]


def test_a_gold_answer_is_graded_by_the_runs_verifier(run: Path) -> None:
    for gold in (14, 48, 2):
        found = answers(saved_policy(str(run)), Question("8,6>14", gold=str(gold), n=8))
        for response in found:
            assert response.parts == CountdownSteps.verify({"numbers": [8, 6], "target": gold}, response.text)
    code, out, _ = said_by("sample", run, "8,6>14", "--gold", "14", "--n", "2")
    assert code == 0 and out.count("score 0, acc 0, format") + out.count("score 1, acc 1, format 1") == 2


def test_the_standard_input_is_one_prompt(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = greedy_rows(run)[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO(row["prompt"] + "\n"))
    _, out, _ = said_by("sample", run, "-", "--temperature", "0")
    assert row["response"] in out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "PROMPT is empty" in refused("sample", run, "-")


def test_what_cannot_be_asked(run: Path, tmp_path: Path) -> None:
    for args, words in {
        ("8,6>14", "--max_new_tokens", "400"): "more than the 256 positions",
        ("8,6>14", "--n", "0"): "--n: '0' is no whole number from 1",
        ("8,6>14", "--n", "99999999999"): "--n: '99999999999' is no whole number from 1",
        ("8,6>14", "--max_new_tokens", "1_0"): "--max_new_tokens: '1_0' is no whole number from 1",
        ("8,6>14", "--temperature", "warm"): "--temperature: 'warm' is no number from 0",
        ("8,6>14", "--temperature", "inf"): "is no number from 0",
        ("8,6>14", "--engine", "sglang"): "--engine: invalid choice: 'sglang'",
        ("8,6>14", "--image", "none.png"): "is no file",
        ("8,6>14", "--gold", "many"): "--gold is 'many'",
        ("anything", "--gold", "3"): "names no numbers and target",
        ("8,6>14", "--gld=3"): "did you mean --gold?",
    }.items():
        assert words in refused("sample", run, *args), args
    state = torch.load(newest(run), weights_only=True)
    torch.save({name: state[name] for name in ("pytorch-lightning_version", "state_dict")}, tmp_path / "alone.ckpt")
    assert "does not say how its run asked" in refused("sample", tmp_path / "alone.ckpt", "8,6>14")


# -- printing --------------------------------------------------------------------------------------------------


def test_what_moves_a_terminals_cursor_is_spelled_out() -> None:
    hostile = {
        "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
        "a\rb\x08\x7f\x00": r"a\rb\x08\x7f\x00",
        "\x9b31m": r"\x9b31m",  # an escape sequence of one byte
        "a\u202eb\u2066c\u200bd\ufeff": r"a\u202eb\u2066c\u200bd\ufeff",
        "\ud800": r"\ud800",
        "\u2028\u2029\U000e0001\ue000": r"\u2028\u2029\U000e0001\ue000",
    }
    for text, shown in hostile.items():
        assert visible(text) == shown
    for text in ("two\nlines\tand a tab", "x² ≤ ½ · 漢字 ∑ é 🙂", r"\frac{1}{2}"):
        assert visible(text) == text


def test_an_answer_is_printed_visible_with_its_grades() -> None:
    ids = torch.tensor([1, 2, 3])
    response = Response(ids, ids.float(), "length", "a\x1b[31mb", {"score": 0.5, "acc\x1b": 1.0}, "timeout")
    assert list(lines([response], graded=True)) == [
        r"-- answer 1 of 1: score 0.5, acc\x1b 1, the verifier failed (timeout), 3 tokens, cut at its limit",
        r"a\x1b[31mb",
        "",
    ]
    assert "score" not in next(iter(lines([response], graded=False)))


# -- how tasks ask ---------------------------------------------------------------------------------------------


def of_dataset(**settings: Any) -> DatasetTask:
    source: Any = {"path": "no file is read", "columns": settings.pop("columns", {})}
    return DatasetTask(settings.pop("verifier", MathVerifier()), [source], {}, **settings)


def test_a_data_sets_template_system_message_and_prefix() -> None:
    task = of_dataset(system="Think.", template="Q: {prompt}\nBox it.", response_prefix="<think>")
    asked = task.ask("1+1", gold="2")
    assert asked.prompt == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Q: 1+1\nBox it."},
        {"role": "assistant", "content": "<think>"},
    ]
    assert asked.answer == "2" and asked.response_prefix == "<think>"
    assert of_dataset(template="Question: {prompt}\nAnswer:", chat=False).ask("1+1").prompt == "Question: 1+1\nAnswer:"
    columns = {"prompt": "question.text", "answer": "solution"}
    (message,) = of_dataset(columns=columns).ask("1+1").prompt
    assert message == {"role": "user", "content": "1+1"}
    (message,) = of_dataset(template="{prompt} Box it.").ask("Find x.", ["picture.png"]).prompt
    assert message == {"role": "user", "content": "<image>Find x. Box it."}


def test_a_template_with_other_places_asks_for_an_object() -> None:
    columns = {"answer": {"numbers": "nums", "target": "target"}}
    task = of_dataset(columns=columns, template="Make {target} of {numbers}.")
    asked = task.ask('{"numbers": [1, 2], "target": 3}', gold='{"numbers": [1, 2], "target": 3}')
    assert asked.prompt == [{"role": "user", "content": "Make 3 of [1, 2]."}]
    assert asked.answer == {"numbers": [1, 2], "target": 3}
    for question in ("3 of 1 and 2", '{"target": 3}', "[3]"):
        with pytest.raises(SettingError, match=r"PROMPT has no .*give a JSON object: \{.target.: \.\.\., .numbers.: "):
            task.ask(question)
    with pytest.raises(SettingError, match="--gold is '3'"):
        task.ask('{"numbers": [1, 2], "target": 3}', gold="3")
    with pytest.raises(SettingError, match="PROMPT has an empty 'nums'"):
        task.ask('{"numbers": "", "target": 3}')


def test_other_tasks_put_around_a_question_what_they_put_around_their_own() -> None:
    problem = Arithmetic(system="Add.").train_problems()[0]
    asked = Arithmetic(system="Add.").ask("7 - 4", gold="3")
    assert asked.prompt[:-1] == problem.prompt[:-1] and asked.prompt[-1] == {"role": "user", "content": "7 - 4"}
    assert asked.answer == 3
    drawn = DrawnGeometry(held_out_problems=7, problems_per_kind=1).ask("x?", ["picture.png"], "57")
    assert drawn.prompt == [{"role": "user", "content": "<image>x?"}]
    assert (drawn.images, drawn.answer) == (("picture.png",), 57)
    assert CountdownSteps(held_out_problems=1).ask("2,7,5>10").prompt == "2,7,5>10:"
    assert CountdownSteps(held_out_problems=1).ask("2,7,5>10:7-2=").prompt == "2,7,5>10:7-2="
    with pytest.raises(SettingError, match="make them as many"):
        DrawnGeometry().ask("<image><image>x?", ["picture.png"])


def test_a_regraded_task_asks_as_the_task_does() -> None:
    task = Regraded(CountdownSteps(held_out_problems=1), CountdownVerifier())
    plain = CountdownSteps(held_out_problems=1)
    assert task.ask("2,7,5>10").prompt == plain.ask("2,7,5>10").prompt == "2,7,5>10:"
    asked = task.ask("2,7,5>10", gold="10")
    assert task.verify(asked.answer, "<answer>2*5</answer>")["acc"] == 0
    assert task.verify(asked.answer, "<answer>7+5-2</answer>")["acc"] == 1


def test_reasoning_gym_asks_and_does_not_grade() -> None:
    pytest.importorskip("reasoning_gym")
    from popo_lightning.tasks.reasoning_gym import ReasoningGymTask

    task = ReasoningGymTask("chain_sum", train_problems=1, held_out_problems=1, system="Be brief.")
    assert task.ask("1 + 1?").prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
    ]
    plain = ReasoningGymTask("chain_sum", train_problems=1, held_out_problems=1, system="Be brief.", chat=False)
    assert plain.ask("1 + 1?").prompt == "Be brief.\n\n1 + 1?\n"
    with pytest.raises(SettingError, match="grades only the questions that it has made"):
        task.ask("1 + 1?", gold="2")


@pytest.mark.parametrize(
    ("like", "gold", "read"),
    [("5", "5", "5"), (5, "7", 7), (5, "0.5", 0.5), ({"a": 1}, '{"a": 2}', {"a": 2}), ([1], "[2]", [2])],
)
def test_gold_answers_are_of_the_tasks_kind(like: Any, gold: str, read: Any) -> None:
    assert gold_like(like, gold) == read
    if not isinstance(like, str):
        with pytest.raises(SettingError, match="give that"):
            gold_like(like, '"text"')


def test_a_task_of_ones_own_needs_nothing_more(run: Path) -> None:
    class Own(Arithmetic):
        pass

    assert Own.ask is Task.ask and Own().ask("1 + 1").prompt[-1]["content"] == "1 + 1"
