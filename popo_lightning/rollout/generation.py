"""Turns problems into graded groups: encodes, generates and grades."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.timing import PhaseClock
from popo_lightning.core.work import Work
from popo_lightning.engines.base import RolloutEngine, Sampling
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.grading.overlong import SoftOverlong
from popo_lightning.grading.pool import Grade, GradingPool
from popo_lightning.model.prompts import Prompt, PromptEncoder


@dataclass(eq=False)
class RolloutGenerator:
    """Encodes, generates and grades, for training and evaluation.

    Args:
        prompts: Makes tokens and image tensors.
        engine: Samples responses; every group records its version.
        pool: Grades responses.
        clock: Receives the seconds of generation and grading.
        rank: Rank of this process.
        world_size: Number of ranks; with `rank` it makes group ids unique without communication.
        image_dtype: Type of stored image tensors, which is the policy's.
        overlong: Penalty for long responses, or None.
    """

    prompts: PromptEncoder
    engine: RolloutEngine
    pool: GradingPool
    clock: PhaseClock
    rank: int
    world_size: int
    image_dtype: torch.dtype
    overlong: SoftOverlong | None

    def __post_init__(self) -> None:
        self.work = Work()
        self.made = 0  # number of groups so far; a checkpoint keeps it, because group ids depend on it

    def make(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        seed: int,
        prefixes: Sequence[Tensor] | None = None,
    ) -> list[Group]:
        """Makes one group of n graded responses for each problem.

        Args:
            problems: Problems to ask.
            n: Number of responses to each.
            sampling: How to draw tokens.
            seed: Seed of all draws.
            prefixes: (P,) tokens for each problem, which its responses continue. They count towards the response limit,
                follow the prompt's tokens, and are part of the text that the verifier reads.
        """
        if prefixes is None:
            prefixes = [torch.empty(0, dtype=torch.long)] * len(problems)
        if (longest := max(map(len, prefixes), default=0)) >= sampling.max_new_tokens:
            raise SettingError(
                f"data.max_new_tokens is {sampling.max_new_tokens}, but a stored prefix has {longest} tokens, so no "
                "response could continue it; resume with the limit of that run"
            )
        with self.clock.measure("generate"):
            prompts = [_continued(self.prompts.encode(p), prefix) for p, prefix in zip(problems, prefixes, strict=True)]
            sampled = self._sample(problems, prompts, prefixes, n, sampling, seed)
        with self.clock.measure("verify"):
            grades = self.pool.collect()
        graded = self._graded(sampled, grades, prefixes, sampling.max_new_tokens)
        return [
            Group(self._next_number(), problem, prompt.ids, of, self.engine.version, self._images(prompt), len(prefix))
            for problem, prompt, prefix, of in zip(problems, prompts, prefixes, graded, strict=True)
        ]

    def ungraded(self, problems: Sequence[Problem], n: int, sampling: Sampling, seed: int) -> list[Group]:
        """Samples groups that are neither graded nor trained on. They use no group ids and no clock."""
        prompts = [self.prompts.encode(problem) for problem in problems]
        sampled = self.engine.generate(prompts, n, sampling, seed)
        return [
            Group(index, problem, prompt.ids, responses, self.engine.version, self._images(prompt))
            for index, (problem, prompt, responses) in enumerate(zip(problems, prompts, sampled, strict=True))
        ]

    def apart(self, clock: PhaseClock) -> RolloutGenerator:
        """Returns a copy with its own clock, for another thread; its groups get their ids by :meth:`numbered`."""
        other = copy.copy(self)
        other.clock = clock
        other.work = Work()  # its progress is not shown
        return other

    def numbered(self, group: Group) -> Group:
        """Returns a group of :meth:`apart` with the next id of this generator."""
        return replace(group, id=self._next_number())

    def _next_number(self) -> int:
        self.made += 1
        return (self.made - 1) * self.world_size + self.rank

    def _images(self, prompt: Prompt) -> dict[str, Tensor]:
        return {
            name: tensor.to(self.image_dtype) if tensor.is_floating_point() else tensor
            for name, tensor in prompt.images.items()
        }

    def _sample(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        prefixes: Sequence[Tensor],
        n: int,
        sampling: Sampling,
        seed: int,
    ) -> dict[int, list[Response]]:
        """Samples responses by problem index, in order of arrival, and passes them to the graders meanwhile."""
        self.pool.discard()
        sampled: dict[int, list[Response]] = {}
        for ready in self.engine.stream(prompts, n, sampling, seed):
            for index, responses in ready:
                sampled[index] = responses
                problem, prefix = problems[index], prefixes[index]
                begin = problem.response_prefix or prompts[index].opened
                texts = [begin + self._whole_text(prefix, response, sampling.stop) for response in responses]
                self.pool.submit([(problem.answer, text) for text in texts])
            self.work.advance(len(sampled), len(prompts))
            self.pool.poll()
        return sampled

    def _graded(
        self, sampled: dict[int, list[Response]], grades: Sequence[Grade], prefixes: Sequence[Tensor], limit: int
    ) -> list[list[Response]]:
        remaining = iter(grades)
        graded: dict[int, list[Response]] = {}
        for index, responses in sampled.items():
            penalties = self._penalties(responses, limit - len(prefixes[index]))
            graded[index] = [_graded(r, next(remaining), p) for r, p in zip(responses, penalties, strict=True)]
        return [graded[index] for index in range(len(prefixes))]

    def _whole_text(self, prefix: Tensor, response: Response, stop: Sequence[str]) -> str:
        if not len(prefix):
            return response.text
        # Prefix and response are decoded together, because a prefix may end inside a character.
        ids = torch.cat((prefix, response.token_ids))
        text: str = self.prompts.tokenizer.decode(ids, skip_special_tokens=True)
        before = len(self.prompts.tokenizer.decode(prefix, skip_special_tokens=True))
        return text[: StopStrings(self.prompts.tokenizer, stop).found(text, before)]

    def _penalties(self, responses: Sequence[Response], limit: int) -> Sequence[float | None]:
        if self.overlong is None:
            return [None] * len(responses)
        return self.overlong.penalties([len(response.token_ids) for response in responses], limit)


def _graded(response: Response, grade: Grade, penalty: float | None) -> Response:
    parts = dict(grade.parts)
    if penalty is not None:
        parts |= {"score": parts["score"] + penalty, "overlong": penalty}
    return replace(response, parts=parts, failure=grade.failure)


def _continued(prompt: Prompt, prefix: Tensor) -> Prompt:
    """Appends the beginning of a response to a prompt."""
    if not len(prefix):
        return prompt
    unexpanded = [*prompt.unexpanded_ids, *prefix.tolist()] if prompt.unexpanded_ids else ()
    return replace(prompt, ids=torch.cat((prompt.ids, prefix)), unexpanded_ids=unexpanded, prefix_len=len(prefix))
