"""Plain functions as rewards are found, called by parameter name, summed, tried once, and refused in one sentence."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset import task, write
from helpers.places import REPOSITORY
from helpers.tiny_models import environment, metrics, popo, tiny_task

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.tasks.regraded import Regraded
from popo_lightning.verifiers.function_reward import FunctionReward

REWARDS = """
import asyncio
from beside import LEAST

def shout(text, answer):
    return float(text == answer.upper())

def short(response):
    return {"score": len(response) < 3, "length": len(response)}

def strict(text, answer, level):
    return level * (text == answer)

def polite(text, question, prompt, tone="plain"):
    return {"score": LEAST, "question": len(question), "prompt": len(prompt), "tone": len(tone)}

def everything(**columns):
    return {"score": len(columns), **{name: 1.0 for name in columns}}

def rest(response, **columns):
    return {"score": len(columns), **{name: 1.0 for name in columns}}

def asks(text, question, **columns):
    return {"score": len(question), **{name: 1.0 for name in columns}}

def wrong(text):
    return {"score": 1.0, "acc": 0.0, "length": -1}

def fails_on_nothing(text):
    return text[0] == "2"

def silent(text):
    pass

def parts_alone(text):
    return {"acc": 1.0}

def slashed(text):
    return {"score": 1.0, "a/b": 2.0}

def sleepy(text):
    import time
    time.sleep(60)

async def later(text):
    return 1.0

def yields(text):
    yield 1.0

def blind(answer):
    return 1.0

def by_place(text, /):
    return 1.0

lazy = lambda text: 1.0
number = 3

class Shout:
    def __call__(self, answer, text):
        return 1.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("LEAST = 0.25\n")
    write(tmp_path / "rows.jsonl", *({"prompt": f"Say {x}", "answer": x, "level": 3, "tone": "warm"} for x in "ab"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    sys.modules.pop("my_rewards", None)
    sys.modules.pop("beside", None)
    return tmp_path


def graded(setting: Any, text: str, **settings: Any) -> Any:
    """Returns the grade of the first row's response."""
    found = task("rows.jsonl", verifier=setting, **settings)
    problem = found.train_problems()[0]
    return pickle.loads(pickle.dumps(found.verify))(problem.answer, text)


@pytest.mark.parametrize("address", ["my_rewards.py:shout", "my_rewards:shout", "./my_rewards.py:shout"])
def test_a_function_of_a_file_or_a_module(folder: Path, address: str) -> None:
    assert graded(address, "A") == 1.0 and graded(address, "a") == 0.0
    assert task("rows.jsonl", verifier=address).train_problems()[0].answer == "a"  # type: ignore[arg-type]


def test_it_is_called_with_what_it_asks_for(folder: Path) -> None:
    assert graded("my_rewards.py:strict", "a") == 3
    assert graded("my_rewards.py:strict", "a", template="{prompt} {tone}") == 3
    assert graded("my_rewards.py:short", "a") == {"score": True, "length": 1}
    found = graded("my_rewards.py:polite", "a", template="Please: {prompt}")
    assert found == {"score": 0.25, "question": len("Please: Say a"), "prompt": len("Please: Say a"), "tone": 4}
    assert graded("my_rewards.py:everything", "a").keys() == {"score", "text", "answer", "prompt", "level", "tone"}
    assert graded("my_rewards.py:rest", "a").keys() == {"score", "answer", "prompt", "level", "tone"}
    found = graded("my_rewards.py:asks", "a")  # a row without a column of that name
    assert found["score"] == len("Say a") and found.keys() == {"score", "answer", "prompt", "level", "tone"}


def test_columns_by_our_names_and_by_their_own(folder: Path) -> None:
    write(folder / "other.jsonl", {"question": "Say a", "gold": "a", "hard": 2})
    columns = {"prompt": "question", "answer": "gold", "level": "hard"}
    source = {"path": "other.jsonl", "columns": columns}
    found = task(source, verifier="my_rewards.py:strict")  # type: ignore[arg-type]
    (problem,) = found.train_problems()
    assert found.verify(problem.answer, "a") == 2
    found = task(source, verifier="my_rewards.py:polite", template="Please: {prompt}")  # type: ignore[arg-type]
    (problem,) = found.train_problems()
    assert found.verify(problem.answer, "a")["question"] == len("Say a")


def test_several_are_added_up(folder: Path) -> None:
    both = [{"function": "my_rewards.py:shout", "weight": 0.5}, "my_rewards.py:short"]
    assert graded(both, "A") == {"score": 1.5, "acc": 1.0, "shout": 1.0, "short": 1.0, "length": 1}
    assert graded(both, "aaaa") == {"score": 0.0, "acc": 0.0, "shout": 0.0, "short": 0.0, "length": 4}
    right = ["my_rewards.py:short", {"function": "my_rewards.py:wrong", "weight": -2}]
    found = graded(right, "A")
    assert found == {"score": -1.0, "acc": 0.0, "short": 1.0, "wrong": 1.0, "length": 1, "wrong_length": -1}


REFUSED = {
    "gone.py:shout": "there is no file gone.py",
    "gone:shout": "there is no module gone here",
    "my_rewards.py:shuot": "my_rewards.py has no function shuot; did you mean shout?",
    "my_rewards.py:later": "which is an async function",
    "my_rewards.py:lazy": r"which is a lambda; write it as def lazy\(",
    "my_rewards.py:Shout": r"which is a class; name a function, or a class derived from Verifier as my_rewards\.Shout",
    "my_rewards.py:number": "which is a int; name a function",
    "my_rewards.py:yields": "which is a generator",
    "my_rewards.py:blind": "which does not ask for the response; give it a parameter text",
    "my_rewards.py:by_place": "parameter text cannot be given by name",
    "broken.py:shout": r"whose module raised NameError: name 'nothing' is not defined at broken\.py:2",
    "half.py:shout": r"whose module raised SyntaxError: .* at half\.py:1",
    "leaves.py:shout": r"whose module raised SystemExit: 3 at leaves\.py:2",
    "needs.py:shout": r"whose module raised ModuleNotFoundError: No module named 'no_such_package' at needs\.py:1",
    "__main__:shout": "functions of a script or notebook are known while it runs",
}


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_no_function_is_one_sentence(folder: Path, address: str) -> None:
    (folder / "broken.py").write_text("\nnothing\n")
    (folder / "half.py").write_text("def :\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "needs.py").write_text("import no_such_package\n")
    with pytest.raises(SettingError, match=rf"^data\.task\.verifier is {re.escape(address)}, .*{REFUSED[address]}"):
        FunctionReward(address)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ([], "is an empty list"),
        (["my_rewards.py:shout", "my_rewards:shout"], "two functions called shout"),
        ([{"function": "my_rewards.py:shout", "weight": float("nan")}], "the weight nan; use a finite number"),
        ([{"function": "my_rewards.py:shout", "weight": True}], "the weight True"),
        ([{"function": "my_rewards.py:shout", "weight": 0}], "the weight 0, so that nothing is learned"),
        ([3], "has 3; give my_rewards.py:shout"),
    ],
)
def test_lists_that_make_no_sum(folder: Path, setting: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        FunctionReward(setting)


TRIED = {
    "fails_on_nothing": (
        r"on an empty response to the first problem, .* raised IndexError: string index out of range at "
        r"my_rewards\.py:\d+ for the response ''; correct the function"
    ),
    "silent": "on the gold answer of .*, .* returned None for the response 'a'; return a number, or a dict of",
    "parts_alone": r"returned \{'acc': 1\.0\} for the response 'a'",
    "slashed": "named a component 'a/b', where a name has letters, .* for the response 'a'; .* under a plain name",
    "sleepy": r"took over 0\.5 s \(the limit of this trial\) for the response 'a'; it has to end within",
}


@pytest.mark.parametrize("name", TRIED)
def test_it_is_tried_before_a_model_loads(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.tasks.reward_settings.SECONDS", 0.5)
    with pytest.raises(SettingError, match=rf"is my_rewards\.py:{name}; tried .*{TRIED[name]}"):
        task("rows.jsonl", verifier=f"my_rewards.py:{name}").train_problems()  # type: ignore[arg-type]


def test_a_column_that_is_not_there(folder: Path) -> None:
    write(folder / "rows.jsonl", {"prompt": "Say a", "answer": "a"}, {"prompt": "Say b", "answer": "b"})
    with pytest.raises(SettingError, match=r"data\.task\.verifier asks for the column 'level', which no row of"):
        task("rows.jsonl", verifier="my_rewards.py:strict").train_problems()  # type: ignore[arg-type]
    write(folder / "rows.jsonl", {"prompt": "Say a", "answer": "a"}, {"prompt": "Say b", "answer": "b", "level": 1})
    found = task("rows.jsonl", verifier="my_rewards.py:strict")  # type: ignore[arg-type]
    assert [problem.question for problem in found.train_problems()] == ["Say b"]
    assert "has no 'level'" in str(found.bad_rows()[0])


def test_another_tasks_problems(folder: Path) -> None:
    (folder / "own.py").write_text("def near(text, answer, target, prompt):\n    return float(str(target) in text)\n")
    found = Regraded(tiny_task(), "own.py:near")
    problem: Problem = found.train_problems()[0]
    target = tiny_task().train_problems()[0].answer["target"]
    assert found.verify(problem.answer, f"x={target}") == 1.0 and found.verify(problem.answer, "x") == 0.0
    assert found.benchmarks().keys() == tiny_task().benchmarks().keys()


def test_nothing_of_it_needs_torch(folder: Path) -> None:
    code = "import sys\nfrom popo_lightning.verifiers.function_reward import FunctionReward\n"
    code += "print(FunctionReward('my_rewards.py:shout')('a', 'A'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=folder)
    assert done.stdout.split() == ["1.0", "False"], done.stderr


def test_a_function_of_a_script_travels_by_value(folder: Path) -> None:
    pytest.importorskip("cloudpickle")
    (folder / "script.py").write_text(
        "from popo_lightning.grading.pool import GradingPool\n"
        "from popo_lightning.verifiers.function_reward import FunctionReward\n"
        "BONUS = 0.5\ndef shout(text, answer):\n    return BONUS + (text == answer.upper())\n"
        "with GradingPool(FunctionReward('__main__:shout')) as pool:\n"
        "    print(pool.grade([('a', 'A'), ('a', 'a')])[0].parts['score'])\n"
    )
    done = subprocess.run([sys.executable, "script.py"], env=environment(), capture_output=True, text=True, cwd=folder)
    assert done.stdout.strip() == "1.5", done.stderr


def test_the_parent_sees_a_file_that_was_changed(folder: Path) -> None:
    file = folder / "changed.py"
    for score in (1, 22):
        file.write_text(f"def shout(text):\n    return {score}\n")
        assert FunctionReward("changed.py:shout")("a", "b") == score


@pytest.mark.slow
@pytest.mark.parametrize("form", ["option", "list", "yaml"])
def test_a_run(folder: Path, config: Path, form: str) -> None:
    rows = [{"prompt": f"{a},{b}>{a + b}:", "answer": str(a + b)} for a in range(1, 9) for b in range(1, a)]
    write(folder / "sums.jsonl", *rows)
    (folder / "sums.py").write_text(
        "def right(text, answer):\n    return float(text.endswith('=' + answer))\n"
        "def signs(text):\n    return '+' in text\n"
    )
    given = {
        "option": ["--data.task.verifier", "sums.py:right"],
        "list": ["--data.task.verifier", "[{function: sums.py:right, weight: 0.5}, sums.py:signs]"],
        "yaml": ["--config", "verifier.yaml"],
    }[form]
    (folder / "verifier.yaml").write_text(
        "data: {task: {class_path: DatasetTask, init_args: {train: [{path: sums.jsonl}], benchmarks: {}, "
        "verifier: 'sums.py:right'}}}\n"
    )
    dataset = [
        "--data.task",
        "DatasetTask",
        "--data.task.train",
        "[{path: sums.jsonl}]",
        "--data.task.benchmarks",
        "{}",
    ]
    dataset += ["--data.task.chat", "false"]
    popo("fit", "--config", config, "--config", REPOSITORY / "configs/method/popo.yaml", *dataset, *given,
         "--trainer.max_epochs", "2",
         "--evaluation.every_n_iterations", "0", "--run.folder", folder / "run")  # fmt: skip
    found = [row for row in metrics(folder / "run") if "train/loss" in row]
    assert len(found) == 2 and all(row["rollout/grading_failures"] == 0 for row in found)
    assert 0 < found[0]["reward/acc"] < 1
    if form == "list":
        assert found[0]["reward/score"] == pytest.approx(0.5 * found[0]["reward/right"] + found[0]["reward/signs"])
        assert found[0]["reward/acc"] == found[0]["reward/right"]
    assert Path("run/config.yaml").read_text().count("sums.py:right") == 1


def test_the_command_refuses_it(folder: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = [
        "--data.task",
        "DatasetTask",
        "--data.task.train",
        "[{path: rows.jsonl}]",
        "--data.task.benchmarks",
        "{}",
    ]
    for given, words in {
        "my_rewards.py:shuot": "did you mean shout?",
        "MathVerifer": "did you mean popo_lightning.verifiers.math.MathVerifier?",
        "[{function: my_rewards.py:shout, wieght: 2}]": "wieght",
        "[{function: my_rewards.py:shout, weight: heavy}]": "heavy",
        "[my_rewards.py]": "names no function; write it as my_rewards.py:shout",
        "my_rewards.py": "names no function; write it as my_rewards.py:shout",
        "{function: my_rewards.py:shout}": "names no function; write it as my_rewards.py:shout, or in a list",
        "[{weight: 2}]": "which lacks function; add it",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            popo("fit", "--config", config, *dataset, "--data.task.verifier", given)
        (sentence,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and words in sentence and sentence.startswith("popo: data.task"), sentence
        assert len(sentence) < 300, sentence
