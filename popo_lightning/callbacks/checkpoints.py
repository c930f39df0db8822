"""When a run saves a checkpoint, and what happens if it cannot."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from popo_lightning.callbacks.checkpoint_writing import (
    NotSavedError,
    contents,
    is_last,
    keeps_none,
    only_tries,
    words,
    write_folder,
)
from popo_lightning.callbacks.closing_words import SavedSoFar, fall_in_words, from_before_a_fall
from popo_lightning.callbacks.own_checkpoints import OwnCheckpoints
from popo_lightning.callbacks.resume_place import ResumePlace
from popo_lightning.core.errors import NotFiniteError, SettingError
from popo_lightning.core.ranks import all_gather_object, all_reduce, lost_rank
from popo_lightning.core.run_data import data_module
from popo_lightning.runs.checkpoint_files import WholeFileIO, take_away, tidy
from popo_lightning.runs.stopping import Stopped, stop_requests
from popo_lightning.training.finite_steps import all_finite, optimizer_state

log = logging.getLogger(__name__)


class Checkpoints(OwnCheckpoints):
    """Lightning's ModelCheckpoint with atomic files; it also saves at the end and where no optimizer step is taken.

    It counts iterations and minibatches, because Lightning's own saves nothing while no optimizer step is taken. Every
    run ends with a checkpoint unless save_top_k is 0 and save_last is unset. If a checkpoint cannot be written or a
    weight is not finite, the log gives the reason, the run continues and the previous checkpoint stays. A run that a
    signal stops saves the last point from which it can be resumed bit for bit; save_on_exception saves that point too.

    The arguments are ModelCheckpoint's. every_n_epochs counts iterations, every_n_train_steps minibatches. Without a
    filename a checkpoint's name is iteration-0015, after 15 iterations, and iteration-0015-minibatch-2 between two
    minibatches. With a monitor the newest is kept beside the best ones.
    """

    _is_set_up = False  # an error before setup needs no closing words

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Makes every writer atomic, and removes the files that a killed writer left behind.

        Raises:
            SettingError: save_on_exception is set, but one rank alone cannot save.
        """
        super().setup(trainer, pl_module, stage)
        self._place: ResumePlace | None = None  # the last resumable point
        self._saved: ResumePlace | None = None
        self._tried: ResumePlace | None = None  # the last place that a save was tried for
        self._behind: ResumePlace | None = None  # the place being saved, if it is not the present one
        self._written: str | None = None  # the newest checkpoint of this process
        self._counts, self._why = {"written": 0, "failed": 0}, ""  # and the reason of the last failure
        self._is_set_up = True
        if stage != "fit":
            return
        lag = getattr(data_module(trainer), "async_level", 0)
        if self.save_on_exception and (trainer.world_size > 1 or lag):
            raise SettingError(
                "checkpoint.save_on_exception is true, which needs one rank and data.async_level 0, but this run has "
                f"{trainer.world_size} ranks and data.async_level {lag}; leave it out"
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileIO()
        if trainer.is_global_zero and self._is_local and Path(str(self.dirpath)).is_dir():
            tidy(Path(str(self.dirpath)))

    @property
    def _is_local(self) -> bool:
        return bool(self.dirpath) and bool(_is_local_file_protocol(self.dirpath or ""))

    # -- when --------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Saves every n minibatches."""
        self._place = ResumePlace.here(trainer)
        due = self._every_n_train_steps >= 1 and self._place.batches % self._every_n_train_steps == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_scheduled(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves every n iterations and after the last, before its evaluation, which may take long."""
        self._place = ResumePlace.here(trainer, finished=True)
        if self._should_skip_saving_checkpoint(trainer):
            return
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and self._should_save_on_train_epoch_end(trainer):
            self._save_scheduled(trainer)
        elif is_last(trainer):
            self._save_end(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of the run."""
        self._save_end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves the last place: on all ranks if the run was asked to stop, else only with save_on_exception."""
        if isinstance(exception, Stopped):
            if trainer.state.fn == "fit":
                self._save_behind(trainer)
                saved = self.saved_so_far(trainer)
                exception.checkpoint, exception.where, exception.unusable = saved.newest, saved.where, saved.unusable
            stop_requests(trainer).disarm()
        elif self._is_set_up and self.save_on_exception and self._place is not None:
            if self._place.weights_moved(trainer):
                log.warning("no checkpoint on this exception: it came inside a minibatch, where no run can resume")
            else:
                self._save_behind(trainer)
        if self._is_set_up and trainer.state.fn == "fit" and trainer.is_global_zero:
            words = self.closing_words(trainer)
            if isinstance(exception, NotFiniteError) and not words:
                words = [self.saved_so_far(trainer).how_to_resume()]
            for sentence in words:
                exception.add_note(sentence)

    def saved_so_far(self, trainer: L.Trainer) -> SavedSoFar:
        """What became of the run's checkpoints."""
        return SavedSoFar(
            newest=self._newest(trainer),
            where="" if self._saved is None else self._saved.words,
            why=self._why,
            of_the_end=self._saved is not None and self._saved == self._place,
            off=keeps_none(self),
            weights_only=self.save_weights_only,
            **self._counts,
        )

    def closing_words(self, trainer: L.Trainer) -> list[str]:
        """Sentences for the end of the run: the checkpoints that failed, and whether the newest is worth resuming."""
        saved = self.saved_so_far(trainer)
        found = [None if saved.newest is None else saved.failures(), fall_in_words(trainer, saved.newest)]
        return [sentence for sentence in found if sentence is not None]

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        """Also skips while steps are skipped, since the weights may be breaking; the checkpoint before stays."""
        skipped = getattr(trainer.lightning_module, "finite_steps", None)
        return bool(
            only_tries(trainer)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or (self._saved is not None and self._saved.batches == trainer.fit_loop.epoch_loop.total_batch_idx + 1)
            or (skipped is not None and skipped.in_a_row)
        )

    def _save_scheduled(self, trainer: L.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_newest(trainer, candidates)

    def _save_end(self, trainer: L.Trainer) -> None:
        """Saves the last place unless it is saved or its save failed."""
        done = [place.batches for place in (self._saved, self._tried) if place is not None]
        if self._place is not None and self._place.batches not in done:
            self._save_behind(trainer)

    def _save_behind(self, trainer: L.Trainer) -> None:
        """Saves the last place whatever its metric, unless it is saved or checkpoints are switched off."""
        if self._place is None or keeps_none(self) or only_tries(trainer) or self._saved == self._place:
            return
        self._behind = self._place
        try:
            candidates = self._monitor_candidates(trainer) | self._place.counters
            if self.monitor is None and (not self.save_last or self.save_last == "link"):
                self._save_topk_checkpoint(trainer, candidates)
            self._save_newest(trainer, candidates)
        finally:
            self._behind = None

    def _save_newest(self, trainer: L.Trainer, candidates: dict[str, Tensor]) -> None:
        """Saves the newest beside the best by a metric, or as last.ckpt if save_last asks for that."""
        if self.monitor is None or self.save_last or not self.save_top_k:
            setting = self.save_last
            if self._behind is not None and self.monitor is not None:
                self.save_last = True  # a link would lead to an older one
            try:
                self._save_last_checkpoint(trainer, candidates)
            finally:
                self.save_last = setting
            return
        with self._as_before_if_not_saved(trainer):
            saved = self._written if self._saved == (self._behind or self._place) else None  # as one of the best
            previous = self.last_model_path
            replaced = None if previous in self.best_k_models else previous  # the name of any other file is taken
            target = saved or self._get_metric_interpolated_filepath_name(candidates, trainer, replaced)
            self.last_model_path = target
            if saved is None:
                self._save_checkpoint(trainer, target)
            if previous and self._should_remove_checkpoint(trainer, previous, target):
                self._remove_checkpoint(trainer, previous)

    # -- how ---------------------------------------------------------------------------------------------------

    def _newest(self, trainer: L.Trainer) -> str | None:
        """The newest checkpoint: the one this process wrote last, else the one that it resumes from."""
        return self._written or (None if trainer.ckpt_path is None else str(trainer.ckpt_path))

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._as_before_if_not_saved(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._as_before_if_not_saved(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _as_before_if_not_saved(self, trainer: L.Trainer) -> Iterator[None]:
        """Keeps Lightning's attributes and the older checkpoints as they were if the new one is not written."""
        # the attributes that Lightning sets before it saves are among those that it keeps in checkpoints
        before = {name: copy.copy(value) for name, value in self.state_dict().items()}
        try:
            yield
        except NotSavedError as error:
            vars(self).update(before)
            self._counts["failed"], self._why = self._counts["failed"] + 1, error.why
            newest = self._newest(trainer)
            kept = f"{newest} stays as it is" if newest else "there is no earlier one"
            then = ", and the run ends without one of its end" if is_last(trainer) else ", and the run continues"
            log.warning("%s; %s%s", error, kept, "" if trainer.interrupted else then)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Saves a checkpoint of all ranks. A collective.

        Raises:
            NotSavedError: Raised on all ranks; nothing has changed on the disk.
        """
        self._tried = self._behind or self._place
        why = self._broken(trainer)
        if why is None:
            why = next((each for each in all_gather_object(self._write(trainer, filepath)) if each), None)
        if why is not None:
            raise NotSavedError(filepath, why)
        self._saved = self._behind or self._place
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = self._written = filepath
        self._counts["written"] += 1
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _broken(self, trainer: L.Trainer) -> str | None:
        weights = [*trainer.lightning_module.parameters(), *optimizer_state(trainer.optimizers)]
        if all_reduce(trainer, not all_finite(weights), "max"):
            return "weights or optimizer state hold a number that is not finite"
        return None

    def _write(self, trainer: L.Trainer, filepath: str) -> str | None:
        """Returns why this rank could not write, or None. A rank that fails leaves no other rank waiting."""
        checkpoint = contents(trainer, self._behind, self.save_weights_only, self.state_key)
        strategy = trainer.strategy
        in_shards = isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
        try:
            if in_shards and self._is_local:
                return write_folder(trainer, checkpoint, Path(filepath))
            strategy.save_checkpoint(checkpoint, filepath)
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, RuntimeError) and lost_rank(error):
                raise
            return words(error)
        return None

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not _is_local_file_protocol(filepath):
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            take_away(Path(filepath))

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Keeps the newest and best, and the last good one while steps are skipped or the policy may be broken."""
        skipped = getattr(trainer.lightning_module, "finite_steps", None)
        kept = (skipped is not None and skipped.in_a_row > 0) or from_before_a_fall(trainer, previous)
        kept = kept or previous in self.best_k_models or previous == self.last_model_path
        return not kept and super()._should_remove_checkpoint(trainer, previous, current)
