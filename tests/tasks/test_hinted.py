"""Hinted tosses a coin for each problem. The problem's info and an evaluation's rows contain it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.core.user_question import with_question
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.tasks.hinted import Hinted
from popo_lightning.toys.arithmetic import Arithmetic
from popo_lightning.toys.countdown import CountdownSteps


class Chat(Task):
    verify = staticmethod(CountdownSteps.verify)

    def train_problems(self) -> Sequence[Problem]:
        return [Problem("t", "2:", 1)]

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q"}]
        begun = [*messages, {"role": "assistant", "content": "So"}]
        return {"b": [Problem(str(i), begun if i % 2 else f"{i}:", i, {"level": 1}) for i in range(400)]}


def test_a_coin_decides_and_is_noted() -> None:
    (plain,), (hinted,) = Chat().benchmarks().values(), Hinted(Chat(), "Short. ").benchmarks().values()
    coins = [problem.info["hint"] for problem in hinted]
    assert 0.4 < sum(coins) / 400 < 0.6 and {type(coin) for coin in coins} == {int}
    for before, after, coin in zip(plain, hinted, coins, strict=True):
        assert (after.id, after.answer, after.info["level"]) == (before.id, before.answer, 1)
        if not coin:
            assert after.prompt == before.prompt
        elif isinstance(after.prompt, str):
            assert after.prompt == f"Short. {before.prompt}"
        else:
            assert after.question == "Short. <image>q" and after.response_prefix == "So"
            assert after.prompt[0] == {"role": "system", "content": "s"}
    (again,), (other,) = (
        Hinted(Chat(), "Short. ").benchmarks().values(),
        Hinted(Chat(), "x", seed=1).benchmarks().values(),
    )
    assert again == hinted and [problem.info["hint"] for problem in other] != coins
    (few,) = Hinted(Chat(), "x", share=0.1).benchmarks().values()
    assert 0.05 < sum(problem.info["hint"] for problem in few) / 400 < 0.15


def test_training_is_unchanged_unless_asked() -> None:
    assert Hinted(Chat(), "x").train_problems() == Chat().train_problems()
    assert "hint" in Hinted(Chat(), "x", in_training=True).train_problems()[0].info


def test_what_is_refused() -> None:
    for settings, words in (({"hint": " "}, "hint is empty"), ({"hint": "x", "share": 1.0}, "share is 1.0")):
        with pytest.raises(SettingError, match=words):
            Hinted(Chat(), **settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="use another name"):
        Hinted(Chat(), "x", name="level").benchmarks()


def test_it_stands_for_its_task() -> None:
    task = Arithmetic()
    hinted = Hinted(task, "Think. ")
    assert hinted.verify is task.verify and hinted.stop == task.stop
    assert hinted.ask("3 - 1").prompt == task.ask("3 - 1").prompt
    assert Evaluation(breakdown=["hint"]).breakdown == ("hint",)


def test_messages_without_a_users_get_one() -> None:
    system = {"role": "system", "content": "s"}
    assert with_question([system], "Short.") == [system, {"role": "user", "content": "Short."}]
