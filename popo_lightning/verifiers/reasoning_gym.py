"""The scorers of reasoning-gym, except those that execute their input."""

from __future__ import annotations

import ast
import inspect
import json
from functools import lru_cache
from importlib import import_module, util
from typing import Any

from popo_lightning.core.errors import SettingError
from popo_lightning.verifiers.base import Verifier, check_format_reward
from popo_lightning.verifiers.boxed import last_answer_tag

# Names by which text can be executed. A scorer whose module contains one is never called.
EXECUTING = {
    "compile",
    "eval",
    "exec",
    "literal_eval",
    "parse_expr",
    "pickle",
    "score_answer",  # another data set's scorer
    "subprocess",
    "sympify",
    "system",
    "__import__",
}


class ReasoningGymVerifier(Verifier):
    """Grades the last ``<answer>...</answer>`` with the data set's own scorer, if that scorer only reads.

    Several of reasoning-gym's scorers (countdown, puzzle24 and others in 0.1.25) run SymPy's parser, which is eval, on
    the policy's text. Those are never called. For these data sets an answer is correct if it equals the gold answer up
    to spaces and case, which misses other correct answers. For Countdown use CountdownVerifier.

    Components: acc is 1 if the scorer gives 1, format is 1 if there is an answer, score is the scorer's, and at least
    format_reward if there is an answer.

    Args:
        format_reward: Minimum score of an answer, at least 0 and below 1.
    """

    def __init__(self, format_reward: float = 0.0) -> None:
        check_format_reward(format_reward)
        self.format_reward = format_reward

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns the reward components of a response. The answer names the data set, its settings and the entry."""
        given = last_answer_tag(text)
        if given is None:
            return {"score": 0.0, "acc": 0.0, "format": 0.0}
        given = given.strip()
        data_set, entry = entry_of(json.dumps(answer, sort_keys=True))
        if scorer_only_reads(answer["name"]):
            score = min(1.0, max(0.0, float(data_set.score_answer(given, entry))))
        else:
            score = float(_plain(given) == _plain(str(entry["answer"])))
        return {"score": max(score, self.format_reward), "acc": float(score >= 1), "format": 1.0}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


@lru_cache(maxsize=512)
def entry_of(answer: str) -> tuple[Any, dict[str, Any]]:
    """Generates (data set, entry) of a problem again, so that they need not be sent.

    Args:
        answer: JSON with name, settings (including seed and size) and index.
    """
    read = json.loads(answer)
    data_set = _data_set(read["name"], json.dumps(read["settings"], sort_keys=True))
    return data_set, data_set[read["index"]]


@lru_cache(maxsize=8)
def _data_set(name: str, settings: str) -> Any:
    return library().create_dataset(name, **json.loads(settings))


@lru_cache
def scorer_only_reads(name: str) -> bool:
    """Returns whether no name that executes text occurs in the module of a data set's scorer."""
    kind = import_module("reasoning_gym.factory").DATASETS[name][0]
    module = inspect.getmodule(kind.score_answer)
    assert module is not None
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.alias):
            used |= {*node.name.split("."), node.asname or ""}
    return not used & EXECUTING


def library() -> Any:
    """Imports reasoning-gym, or raises SettingError if it is not installed."""
    if util.find_spec("reasoning_gym") is None:
        raise SettingError("data.task needs reasoning-gym, which is not installed; pip install reasoning-gym")
    return import_module("reasoning_gym")
