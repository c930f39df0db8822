"""The engine of a run: its context at the start, and the check that its log-probs are the policy's."""

from __future__ import annotations

from functools import partial

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.rollout.engine_gap import EngineCheck, GapLimits, measured_gap
from popo_lightning.rollout.resumable import ResumableRollouts


class EngineRollouts(ResumableRollouts):
    """The part of :class:`RolloutDataModule` that uses the engine."""

    engine: RolloutEngine
    sampling: Sampling
    max_prompt_tokens: int
    image_pixels: tuple[int, int] | None
    longest_response: int

    def _engine_context(self) -> EngineContext:
        """Asked for once the strategy has set up the process group."""
        strategy = self._run.strategy
        longest = self.max_prompt_tokens + max(self.sampling.max_new_tokens, self.longest_response)
        positions = getattr(self._module.model.config.get_text_config(), "max_position_embeddings", None) or longest
        if longest > positions:
            raise SettingError(
                f"data.max_prompt_tokens is {self.max_prompt_tokens} and the longest response "
                f"{longest - self.max_prompt_tokens} (data.max_new_tokens, or an evaluation's), which is more than the "
                f"{positions} positions of model.path; lower them"
            )
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
            as_saved=self._module.as_saved,
        )

    def compare_engine(self, limits: GapLimits) -> None:
        """Has the engine's log-probs compared with the policy's once it starts, and after the first sync."""
        problems = self.problems.train if self._fitting else [p for _, of in self.problems.benchmarks for p in of]
        if self.engine.checked and problems and not self.synced.start_seconds:
            measure = partial(measured_gap, self.maker, self._module, problems, self.sampling)
            self.check = self.synced.check = EngineCheck(measure, limits, self._module, type(self.engine).__name__)
            self.synced.as_loaded = lambda: not self._module.restored and self._run.global_step == 0

    def sync(self) -> None:
        """Gives the engine the policy's newest weights, unless it has them already."""
        self.synced.newest(self._run.global_step, self.iteration)

    @property
    def start_seconds(self) -> float:
        """Of the engine, once a process."""
        return self.synced.start_seconds
