"""Finds gold answers that no response could match, before a run pays for them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from popo_lightning import __version__
from popo_lightning.core.cache import cache_folder
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.whole_files import replaced
from popo_lightning.grading.pool import GradingPool
from popo_lightning.verifiers.base import Verifier

SECONDS_PER_ANSWER = 10.0
NEWS_AFTER = 5.0  # seconds until the user is told
AT_A_TIME = 200  # answers checked between two looks at the clock
MAX_GRADERS = 4
PLAIN_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", re.ASCII)
REFUSED = "refused_"

log = logging.getLogger(__name__)


class AnswerCheck:
    """A verifier's check of gold answers in a form that a grading process can run.

    Such a process returns only named numbers, so the verifier's message is returned as a name, in hexadecimal digits.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __call__(self, answer: Any, text: str) -> dict[str, float]:
        """Returns score 1, or score 0 and the verifier's message."""
        try:
            self.verifier.check_answer(answer)
        except ValueError as error:
            return {"score": 0.0, REFUSED + reason(error).encode(errors="replace").hex(): 0.0}
        return {"score": 1.0}


def refused_answers(verifier: Verifier, answers: Sequence[Any]) -> dict[str, str]:
    """Returns the verifier's message for each answer that it refuses, by the answer's :func:`key`.

    Answers are hostile and a check may be slow, so it runs in processes that can be killed. The verdicts are cached. If
    one plain number is accepted, the others are not checked, because all are alike.

    Raises:
        SettingError: The verifier cannot be loaded in a grading process.
    """
    if type(verifier).check_answer is Verifier.check_answer:
        return {}
    distinct = {key(answer): answer for answer in answers}
    plain = [name for name, answer in distinct.items() if isinstance(answer, str) and PLAIN_NUMBER.fullmatch(answer)]
    spoken_for = set(plain[1:])
    refused = _checked(verifier, {name: answer for name, answer in distinct.items() if name not in spoken_for})
    if plain and plain[0] in refused:
        refused = _checked(verifier, distinct)
    return refused


def key(answer: Any) -> str:
    """Returns an answer as one line of text."""
    return json.dumps(answer, sort_keys=True)


def _checked(verifier: Verifier, answers: dict[str, Any]) -> dict[str, str]:
    if not answers:
        return {}
    file = cache_folder() / "answers" / f"{_digest(verifier, answers)}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # only one of several processes checks
            known = _known(file)
            if known is None:
                known = _check(verifier, answers)
                with replaced(file) as draft:
                    draft.write(json.dumps(known))
            return known
    except OSError as error:
        log.warning("the cache folder %s cannot be used (%s); gold answers are checked anew", cache_folder(), error)
        return _check(verifier, answers)


def _digest(verifier: Verifier, answers: dict[str, Any]) -> str:
    """Returns the cache key of the verdicts. It depends on the verifier, its settings, the version and the answers."""
    module = sys.modules[type(verifier).__module__]
    code = [Path(module.__file__)] if module.__file__ else []
    if module.__package__ and code:  # also the modules beside it, which it may import
        code = sorted(code[0].parent.glob("*.py"))
    texts = [file.read_bytes() for file in code]
    parts = [__version__.encode(), pickle.dumps(verifier), *texts, "\n".join(answers).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def _known(file: Path) -> dict[str, str] | None:
    """Reads cached verdicts; None if there are none or they are unreadable."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    well_formed = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if well_formed else None


def _check(verifier: Verifier, answers: dict[str, Any]) -> dict[str, str]:
    graders = min(MAX_GRADERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    names, refused = list(answers), {}
    began, told = time.monotonic(), False
    with GradingPool(AnswerCheck(verifier), graders, SECONDS_PER_ANSWER, "the limit of this check") as pool:
        for start in range(0, len(names), AT_A_TIME):
            part = names[start : start + AT_A_TIME]
            try:
                grades = pool.grade([(answers[name], "") for name in part])
            except RuntimeError as error:
                raise SettingError(
                    f"data.task.verifier is {type(verifier).__name__}, which does not start in a grading process: "
                    f"{reason(error)}"
                ) from error
            for name, grade in zip(part, grades, strict=True):
                if grade.failure is not None or grade.parts["score"] != 1.0:
                    refused[name] = _why(grade.failure, list(grade.parts))
            spent, done = time.monotonic() - began, start + len(part)
            if spent > NEWS_AFTER and not told and done < len(names):
                told = True
                left = spent / done * (len(names) - done)
                log.warning("checking %d gold answers, about %.0f s more; kept for the next run", len(names), left)
    return refused


def _why(failure: str | None, parts: Sequence[str]) -> str:
    if failure == "timeout":
        return f"it takes over {SECONDS_PER_ANSWER:g} s to read"
    if failure is not None:
        return f"reading it fails ({failure})"
    with suppress(StopIteration, ValueError):  # what was graded may have forged the reply
        written = next(part.removeprefix(REFUSED) for part in parts if part.startswith(REFUSED))
        return reason(ValueError(bytes.fromhex(written).decode()))
    return "it is refused"
