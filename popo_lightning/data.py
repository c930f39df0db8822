"""Rollouts as data: an iterable dataset over sampler, engine, verifier, composer and buffer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from popo_lightning.core.kept_state import Watch
from popo_lightning.core.minibatch import Minibatch, split_minibatches
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.core.task import Task
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import RolloutEngine, Sampling
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.grading.overlong import SoftOverlong
from popo_lightning.grading.pool import GradingPool, check_grades
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.replay.composer import Composer, OnPolicy, composed_groups
from popo_lightning.rollout.ahead import AsyncRollouts
from popo_lightning.rollout.checks import check_settings, check_training, warn_of_problems_that_never_return
from popo_lightning.rollout.engine_gap import EngineCheck
from popo_lightning.rollout.engine_rollouts import EngineRollouts
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.rollout.iteration import IterationRollouts
from popo_lightning.rollout.limit_settings import Limit
from popo_lightning.rollout.limits import Limits
from popo_lightning.rollout.problem_sets import ProblemSets
from popo_lightning.rollout.rank_states import PlaceState, RankKeeper
from popo_lightning.rollout.report import RolloutReport, Totals, composer_metrics, of_all_ranks, rollout_metrics
from popo_lightning.rollout.stream import RolloutStream
from popo_lightning.rollout.weight_sync import WeightSync
from popo_lightning.runs.folder import EVALUATIONS
from popo_lightning.runs.stopping import StopRequests
from popo_lightning.tasks.samplers import EpochSampler, PromptSampler


class RolloutDataModule(EngineRollouts):
    r"""Turns a task into the policy's minibatches. Everything that generates during a run goes through it.

    One epoch is one rollout iteration: sync weights, sample problems, generate, grade, compose, and yield
    ``minibatches`` minibatches ``ppo_epochs`` times. Each minibatch is one optimizer step. ``trainer.max_epochs`` is
    the number of iterations.

    Args:
        task: Problems and their verifier.
        engine: Samples the responses.
        composer: Combines fresh and stored groups into the groups to train on.
        sampler: Chooses the problems of an iteration.
        problems_per_iteration: B, problems sampled per iteration over all ranks.
        group_size: K, responses sampled per problem.
        minibatches: Number of equal parts an iteration's groups are split into; each is one optimizer step.
        ppo_epochs: Number of passes over the minibatches of an iteration.
        weight_sync_interval: Iterations between weight syncs. In between, the engine samples with the weights of the
            last sync.
        async_level: 0 samples with the newest weights. 1 generates and grades the next iteration's responses while this
            one trains, so responses are one policy version old; it needs an engine apart from the trainer.
        temperature: Sampling temperature in training. There is no top_p and no top_k, because the recorded log-probs
            must be those of the distribution sampled from.
        temperature_spread: Half the width of the range around temperature from which each response of a group draws a
            temperature of its own, such as 0.2 for 0.8 to 1.2. 0 samples all at temperature. Prox and policy are
            scored at temperature, so model.behave_weight must correct fresh rows (correct_fresh true).
        behave: Whose log-probs of sampled tokens are kept for later weights. engine keeps those recorded at sampling.
            trainer keeps the policy's own from a forward pass over the samples, free of the engine's rounding.
        max_new_tokens: Response limit in tokens.
        max_prompt_tokens: Prompt limit in tokens. Problems with longer prompts are left out and counted, never cut.
        image_pixels: Minimum and maximum number of pixels of an image. Engine and policy resize images to fit. null
            keeps the limits of the model's processor.
        stop: Strings that end a response, such as ["\nQuestion:"], for policies that do not end by themselves. The
            tokens of the string are kept and trained on; verifiers read the text before it. null uses the task's own
            strings: none for chat messages, otherwise those that data.task.chat false implies.
        effective_key: Reward component that decides whether a group is effective. null takes model.reward_key, the one
            trained on; set acc if partial rewards alone should not make a group effective.
        overlong: Penalty for responses close to max_new_tokens; null gives none.
        limits: Bounds on mean costs of responses, by name: length, truncated, kl, a reward component, or
            COMPONENT_error. A number is a bound; docs/limits.md has the settings of each.
        num_graders: Grading processes per rank.
        grading_timeout: Seconds after which a grader is killed and the response gets reward 0.
        seed: Seed of the run, set from seed_everything.
    """

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine = VLLMEngine(),  # noqa: B008  # loads nothing before start()
        composer: Composer = OnPolicy(),  # noqa: B008
        sampler: PromptSampler = EpochSampler(),  # noqa: B008
        problems_per_iteration: int = 32,
        group_size: int = 8,
        minibatches: int = 2,
        ppo_epochs: int = 1,
        weight_sync_interval: int = 1,
        async_level: Literal[0, 1] = 0,
        temperature: float = 1.0,
        temperature_spread: float = 0.0,
        behave: Literal["engine", "trainer"] = "engine",
        max_new_tokens: int = 1024,
        max_prompt_tokens: int = 1024,
        image_pixels: tuple[int, int] | None = None,
        stop: list[str] | None = None,
        effective_key: str | None = None,
        overlong: SoftOverlong | None = None,
        limits: dict[str, float | Limit] | None = None,
        num_graders: int = 1,
        grading_timeout: float = 5.0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.task = task
        self.engine = engine
        self.composer = composer
        self.sampler = copy.copy(sampler)  # the default is one object for all modules, and samplers keep a cursor
        self.problems_per_iteration = problems_per_iteration
        self.group_size = group_size
        self.minibatches = minibatches
        self.ppo_epochs = ppo_epochs
        self.weight_sync_interval = weight_sync_interval
        self.async_level = async_level
        strings = tuple(task.stop if stop is None else stop)
        self.sampling = Sampling(max_new_tokens, temperature, stop=strings, temperature_spread=temperature_spread)
        self.behave = behave
        self.max_prompt_tokens = max_prompt_tokens
        self.image_pixels = image_pixels
        self.effective_key = effective_key
        self.overlong = overlong
        self.num_graders = num_graders
        self.grading_timeout = grading_timeout
        self.seed = seed
        check_settings(self)
        self.limits = Limits(limits, max_new_tokens)

        self.clock = PhaseClock()
        self.ahead = AsyncRollouts()
        self.components: set[str] = set()  # reward components that a response has had
        self.longest_response = 0  # maximum response tokens of an evaluation
        self.totals = Totals()
        self.report: RolloutReport | None = None  # report of the present iteration
        self.rollout_metrics: dict[str, float] = {}  # its metrics, which checkpoints keep
        self.iteration = 0  # iterations begun
        self.pending: list[Minibatch] = []  # minibatches of this iteration still to come
        self.kept_by_ranks = RankKeeper()  # state that callbacks keep for each rank
        self.as_of: PlaceState | None = None  # an earlier point of the run, whose state the next checkpoint saves
        self.stopping = StopRequests()
        self._stores: dict[str, Any] | None = None  # states of sampler and composer since the iteration began
        self._watches: Sequence[Watch] = ()  # watch both for attributes that they do not save
        self.check: EngineCheck | None = None
        self.weight_sync = WeightSync(
            engine,
            weight_sync_interval,
            self.clock,
            self._engine_context,
            lambda: self._module,  # it does not exist yet
            self.ahead.join,
        )

    # -- set-up ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads tokenizer and verifier. For fit it also reads the problems and drops those with too long prompts."""
        self.engine.check(self._run.strategy.root_device)
        world_size, rank = self._run.world_size, self._run.global_rank
        prompts = PromptEncoder(self._module.folder, self.max_prompt_tokens, self.image_pixels)
        folder = Path(self._run.default_root_dir)
        if not self._fitting:  # the folder may be a run's, which has its own list
            folder = folder / EVALUATIONS / stage
        self.problems = ProblemSets(self.task, prompts, world_size, folder if self._run.is_global_zero else None)
        self._pool = GradingPool(self.task.verify, self.num_graders, self.grading_timeout)
        self.generator = RolloutGenerator(
            prompts,
            self.engine,
            self._pool,
            self.clock,
            rank,
            world_size,
            self._module.compute_dtype,
            self.overlong,
        )
        self._module.keeps_reference = self.limits.need_reference or self.composer.needs_reference
        self.weight_sync.forget()  # the trainer may have loaded other weights
        if not self._fitting:
            return
        check_training(self, self._module, world_size)
        self.sampler.start(len(self.problems.train), self.seed, rank, world_size)
        self._watches = Watch("data.sampler", self.sampler), Watch("data.composer", self.composer)
        warn_of_problems_that_never_return(self, self._run.max_epochs or 0, world_size)

    def teardown(self, stage: str) -> None:
        """Ends the grading processes. The engine stays for a following validate or test."""
        self.ahead.close()
        self._pool.close()

    # -- one iteration -----------------------------------------------------------------------------------------

    def iterate(self) -> Iterator[Minibatch]:
        """Yields the minibatches of a new iteration, or the rest of the one that a checkpoint interrupted."""
        if not self.pending:
            self.stopping.check(self._run)
            # Signals act at once if there is a single rank and the last checkpoint state can still be saved.
            with self.stopping.interruptible(self.async_level == 0 and self._run.world_size == 1):
                self._begin_iteration()
            if not self.async_level:  # else the groups generated ahead are already taken, which a checkpoint would need
                self.stopping.check(self._run)
        while self.pending:
            yield self.pending.pop(0)

    def _begin_iteration(self) -> None:
        self._stores = None
        with self.clock.measure("wait"):
            self.ahead.join()
        if any(all_gather_object(self.composer.samples_next())):
            # This precedes the composer's decisions, which differ by rank: gathering sharded weights needs all ranks.
            self.weight_sync.for_rollouts(self._run.global_step, self.iteration)
        self.report = RolloutReport(self.iteration, self.effective_key or self._module.reward_key)
        with self.clock.measure("compose"):
            iteration = self._begun(self.report)
            groups = composed_groups(self.composer, iteration)
            iteration.end()
            self.report.composed(groups)
            groups = self.limits.charged(self.report.fresh, groups, self._module, self.iteration)
            deal = iteration.random("deal")
            sizes = self.minibatches, self.ppo_epochs
            self.pending = split_minibatches(groups, self.iteration, *sizes, deal, self.composer.trained_last())
        if not self.async_level:
            self.engine.sleep()
        seconds = {"generate_seconds": self.clock.seconds("generate") + self.ahead.take_generate_seconds()}
        everyones = all_gather_object((self.report.counts() | seconds, self.composer.report()))
        counts = of_all_ranks([of_rank for of_rank, _ in everyones])
        composed = composer_metrics([of_rank for _, of_rank in everyones])
        if not self.iteration:
            check_grades(counts, all_gather_object(self._pool.first_failure))
        self.totals.add(counts)
        self.rollout_metrics = rollout_metrics(counts) | composed | self.ahead.report()
        self.rollout_metrics |= self.limits.metrics()
        self.iteration += 1
        if self.async_level:
            self._begun(self.report).generate_ahead()  # also after the last iteration, whose checkpoint may be resumed

    def _begun(self, report: RolloutReport) -> IterationRollouts:
        share = self.problems_per_iteration // self._run.world_size
        return IterationRollouts(self, self._module, report, share)

    # -- loaders -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Minibatch]:
        """Returns a loader of one rollout iteration."""
        return DataLoader(RolloutStream(self.iterate, self.steps), batch_size=None, num_workers=0)

    def val_dataloader(self) -> Any:
        """Returns one batch per benchmark; none during fit, where the Evaluation callback has its own schedule."""
        if self._fitting:
            return []
        return DataLoader(self.benchmarks(), batch_size=None, num_workers=0)  # type: ignore[arg-type]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves batches where they are, because micro-batches move to the device one by one."""
        return batch
