"""Procedural tasks of reasoning-gym."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.core.user_question import ASKED
from popo_lightning.tasks.template import NEXT_QUESTION
from popo_lightning.verifiers.reasoning_gym import ReasoningGymVerifier, library, scorer_only_reads

log = logging.getLogger(__name__)

SYSTEM = (
    "Think about the problem step by step, then give only the final answer between <answer> and </answer>, in the form "
    "that the question asks for."
)


class ReasoningGymTask(Task):
    """Problems of one reasoning-gym data set; needs the extra ``reasoning-gym``.

    Train and held-out problems come from different seeds. A question that occurs in both is left out of training.

    Args:
        name: Data set, such as "chain_sum" or "knights_knaves".
        settings: The data set's own settings, such as {min_terms: 2, max_terms: 3}, without seed and size.
        train_problems: Number of training problems.
        held_out_problems: Number of problems of the benchmark, which has the data set's name.
        seed: Seed of the training problems; held-out problems use the next seed.
        format_reward: Minimum score of a response with an answer, at least 0 and below 1.
        system: System message; null for none.
        chat: Ask in chat messages. false asks in plain text and ends responses at the next question; see data.stop.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any] | None = None,
        train_problems: int = 2000,
        held_out_problems: int = 200,
        seed: int = 0,
        format_reward: float = 0.0,
        system: str | None = SYSTEM,
        chat: bool = True,
    ) -> None:
        for setting, count in (("train_problems", train_problems), ("held_out_problems", held_out_problems)):
            at_least(f"data.task.{setting}", count, 1)
        if reserved := {"seed", "size"} & set(settings or {}):
            raise SettingError(
                f"data.task.settings has {min(reserved)}, which data.task.seed, train_problems and held_out_problems "
                "decide; take it out"
            )
        self.name = name
        self.settings = settings or {}
        self.train_size = train_problems
        self.held_out_size = held_out_problems
        self.seed = seed
        self.system = system
        self.chat = chat
        self.stop = () if chat else NEXT_QUESTION
        self.verify = ReasoningGymVerifier(format_reward)
        self._check()

    def _check(self) -> None:
        library()
        from reasoning_gym.factory import DATASETS

        if self.name not in DATASETS:
            close = sorted(name for name in DATASETS if name[:3] == self.name[:3]) or sorted(DATASETS)
            raise SettingError(
                f"data.task.name is '{self.name}', which reasoning-gym does not have; it has {', '.join(close)[:300]}"
            )
        if not scorer_only_reads(self.name):
            log.warning(
                "reasoning-gym's scorer of %s could execute a response and is not used: only its own answer, letter "
                "for letter, is right",
                self.name,
            )

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        held_out = self._made(self.seed + 1, self.held_out_size, f"{self.name}/held-out")
        questions = {problem.question for problem in held_out}
        made = self._made(self.seed, self.train_size, self.name)
        return [problem for problem in made if problem.question not in questions], held_out

    def _made(self, seed: int, size: int, id: str) -> list[Problem]:
        settings = self.settings | {"seed": seed, "size": size}
        try:
            entries = list(library().create_dataset(self.name, **settings))
        except (AssertionError, TypeError, ValueError) as error:
            raise SettingError(
                f"data.task.settings is {self.settings}, which reasoning-gym's {self.name} does not take: "
                f"{reason(error)}"
            ) from error
        prompts = [self._framed(str(entry["question"])) for entry in entries]
        return [
            Problem(f"{id}-{seed}-{index}", prompt, {"name": self.name, "settings": settings, "index": index})
            for index, prompt in enumerate(prompts)
        ]

    def _framed(self, question: str) -> str | list[dict[str, Any]]:
        if not self.chat:
            return question if self.system is None else f"{self.system}\n\n{question}\n"
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*messages, {"role": "user", "content": question}]

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Asks a question without a gold answer, because reasoning-gym grades only questions that it has made."""
        if gold is not None or images:
            raise SettingError(
                f"{'--gold' if gold is not None else '--image'} is given, but reasoning-gym grades only the questions "
                "that it has made, which have no images; leave it out"
            )
        return Problem(ASKED, self._framed(question), None)

    def train_problems(self) -> Sequence[Problem]:
        """Returns the training problems."""
        return self._split[0]

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns the held-out problems, under the data set's name."""
        return {self.name: self._split[1]}
