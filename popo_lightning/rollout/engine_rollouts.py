"""The engine of a run: its context at the start, and the check that its log-probs are the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import lightning as L

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.core.run_data import data_module
from popo_lightning.core.task import Task
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.grading.overlong import SoftOverlong
from popo_lightning.rollout.engine_gap import EngineCheck, GapLimits, few_answers, measured_gap
from popo_lightning.rollout.problem_sets import Benchmark
from popo_lightning.rollout.report import RolloutReport
from popo_lightning.rollout.resumable import ResumableRollouts
from popo_lightning.rollout.weight_alarms import Probe


class EngineRollouts(ResumableRollouts):
    """The part of :class:`RolloutDataModule` that uses the engine, and what else callbacks and checks read of it."""

    task: Task
    engine: RolloutEngine
    sampling: Sampling
    behave: str
    problems_per_iteration: int
    group_size: int
    weight_sync_interval: int
    effective_key: str | None
    overlong: SoftOverlong | None
    num_graders: int
    grading_timeout: float
    seed: int
    clock: PhaseClock
    report: RolloutReport | None
    max_prompt_tokens: int
    image_pixels: tuple[int, int] | None
    longest_response: int
    components: set[str]

    def _engine_context(self) -> EngineContext:
        """Returns the engine's context. The strategy must have set up the process group."""
        strategy = self._run.strategy
        longest = self.max_prompt_tokens + max(self.sampling.max_new_tokens, self.longest_response)
        check_positions(self._module.model.config, self.max_prompt_tokens, longest)
        return EngineContext(
            folder=self._module.folder,
            device=strategy.root_device,
            dtype=self._module.compute_dtype,
            rank=self._run.global_rank,
            world_size=self._run.world_size,
            max_tokens=longest,
            forbidden_token_ids=self._module.forbidden_token_ids,
            image_pixels=self.image_pixels,
            images_per_prompt=self.problems.images_per_prompt(self._fitting),
            local_rank=self._run.local_rank,
            responses=self.problems_per_iteration * self.group_size // self._run.world_size if self._fitting else None,
            as_saved=self._module.as_saved,
        )

    def compare_engine(self, limits: GapLimits) -> None:
        """Arranges comparisons of the engine's log-probs with the policy's, at its start and after the first sync."""
        problems = self.problems.train if self._fitting else [p for _, of in self.problems.benchmarks for p in of]
        if self.engine.checked and problems and not self.weight_sync.start_seconds:
            sampling = replace(self.sampling, temperature_spread=0.0)  # the policy scores at one temperature
            measure = partial(measured_gap, self.generator, self._module, problems, sampling)
            self.check = self.weight_sync.check = EngineCheck(measure, limits, self._module, type(self.engine).__name__)
            self.weight_sync.as_loaded = lambda: self._module.as_loaded and self._run.global_step == 0
            if self._fitting:
                self.weight_sync.probe = Probe(partial(few_answers, self.generator, problems, self.sampling))

    def sample(self, problems: Sequence[Problem], n: int, sampling: Sampling, seed: int) -> list[Group]:
        """Samples n graded responses for each problem, as one group each. For training and evaluation alike.

        Args:
            problems: Problems to ask.
            n: Number of responses to each.
            sampling: How to draw tokens.
            seed: Seed of all draws.
        """
        return self.generator.make(problems, n, sampling, seed)

    def sync(self) -> None:
        """Gives the engine the policy's newest weights, unless it has them already."""
        self.weight_sync.newest(self._run.global_step, self.iteration)

    @property
    def start_seconds(self) -> float:
        """Seconds of the engine's start and checks in this process."""
        return self.weight_sync.start_seconds

    def benchmarks(self) -> list[Benchmark]:
        """Returns the held-out problems with prompts that fit, by benchmark."""
        return self.problems.benchmarks


def check_positions(config: Any, prompt: int, longest: int) -> None:
    """Raises SettingError if a model has too few positions.

    Args:
        config: Configuration of the model.
        prompt: Maximum number of tokens of a prompt.
        longest: Maximum number of tokens of a prompt and its response.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise SettingError(
            f"data.max_prompt_tokens is {prompt} and the longest response {longest - prompt} (data.max_new_tokens, or "
            f"an evaluation's), which is more than the {positions} positions of model.path; lower them"
        )


def rollouts_of(trainer: L.Trainer) -> EngineRollouts:
    """The rollouts of a trainer: its data module."""
    return cast(EngineRollouts, data_module(trainer))
