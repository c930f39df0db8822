"""Tasks of reasoning-gym, with their own scorers if these only read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.grading.pool import GradingPool
from popo_lightning.tasks.reasoning_gym import ReasoningGymTask
from popo_lightning.tasks.template import NEXT_QUESTION
from popo_lightning.verifiers.reasoning_gym import ReasoningGymVerifier, entry_of, scorer_only_reads

pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")

EVALUATING = ("countdown", "puzzle24", "simple_integration", "polynomial_multiplication", "intermediate_integration")
TASKS = ["chain_sum", "knights_knaves", "graph_color", "word_sorting", "countdown", "basic_arithmetic"]


def small(name: str, **settings: object) -> ReasoningGymTask:
    return ReasoningGymTask(name, train_problems=12, held_out_problems=6, **settings)  # type: ignore[arg-type]


def gold(task: ReasoningGymTask, index: int) -> str:
    _, entry = entry_of(json.dumps(task.train_problems()[index].answer, sort_keys=True))
    if entry["answer"] is None:  # many answers are right; the metadata has one
        return json.dumps(entry["metadata"]["possible_answer"])
    return str(entry["answer"])


def test_scorers_that_run_what_they_read_are_known() -> None:
    assert not any(scorer_only_reads(name) for name in (*EVALUATING, "composite", "codeio"))
    assert all(scorer_only_reads(name) for name in ("chain_sum", "graph_color", "knights_knaves"))


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_are_right_and_others_wrong(name: str) -> None:
    task = small(name)
    for index, problem in enumerate(task.train_problems()):
        answer = gold(task, index)
        right = task.verify(problem.answer, f"<think>5</think> <answer> {answer}\n</answer>")
        assert right == {"score": 1.0, "acc": 1.0, "format": 1.0}
        wrong = task.verify(problem.answer, "<answer>certainly not</answer>")
        assert wrong["acc"] == 0 and wrong["score"] < 1 and wrong["format"] == 1
        assert task.verify(problem.answer, answer)["format"] == 0  # without the tags there is no answer


def test_a_scorer_may_know_other_right_answers() -> None:
    """A graph has many colourings, and only the data set's scorer accepts them all."""
    task = small("graph_color")
    colors = json.loads(gold(task, 0))
    names = sorted(set(colors.values()))
    renamed = {node: names[(names.index(color) + 1) % len(names)] for node, color in colors.items()}
    assert renamed != colors
    assert task.verify(task.train_problems()[0].answer, f"<answer>{json.dumps(renamed)}</answer>")["acc"] == 1


def test_hostile_answers_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    tasks = [small(name) for name in TASKS]
    with GradingPool(tasks[0].verify, grading_timeout=5.0) as pool:
        texts = [f"<answer>{text}</answer>" for text in (code, f"eval({code!r})", "9**9**9**9", "(" * 500, "\x00")]
        items = [(task.train_problems()[0].answer, text) for task in tasks for text in texts]
        grades = pool.grade(items)
    assert not marker.exists()
    assert all(grade.parts["acc"] == 0 for grade in grades)


def test_held_out_is_held_out_and_everything_is_repeatable() -> None:
    task, again = small("coin_flip"), small("coin_flip")  # few questions, so some occur twice
    assert task.train_problems() == again.train_problems() and task.benchmarks() == again.benchmarks()
    (held_out,) = task.benchmarks().values()
    assert len(held_out) == 6
    asked = {problem.prompt[-1]["content"] for problem in task.train_problems()}  # type: ignore[index]
    assert not asked & {problem.prompt[-1]["content"] for problem in held_out}  # type: ignore[index]
    ids = [problem.id for problem in [*task.train_problems(), *held_out]]
    assert len(set(ids)) == len(ids)
    pickle.loads(pickle.dumps(task.verify))
    plain = small("coin_flip", chat=False, system=None).train_problems()[0].prompt
    assert plain in asked
    assert task.stop == () and small("coin_flip", chat=False).stop == NEXT_QUESTION


def test_bad_settings_are_one_sentence() -> None:
    for settings, words in (
        ({"name": "chain_sun"}, "data.task.name is 'chain_sun'.*chain_sum"),
        ({"name": "chain_sum", "settings": {"seed": 1}}, "data.task.settings has seed"),
        ({"name": "chain_sum", "train_problems": 0}, "data.task.train_problems is 0"),
    ):
        with pytest.raises(SettingError, match=words):
            ReasoningGymTask(**settings)  # type: ignore[arg-type]
    for wrong in ({"min_terms": 9, "max_terms": 2}, {"no_such": 1}):
        with pytest.raises(SettingError, match="which reasoning-gym's chain_sum does not take"):
            small("chain_sum", settings=wrong).train_problems()
    with pytest.raises(SettingError, match="format_reward"):
        ReasoningGymVerifier(1.0)
