"""Silences messages of Lightning, transformers and vLLM that do not apply to rollouts."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silences advice that does not apply to rollouts, so that the rest is worth reading."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler asked for these
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)  # expected on a CPU
    for about in (
        ".*num_workers.*",  # the dataset holds the engine
        ".*`__len__`.*",  # see RolloutStream
        ".*Total length of `list` across ranks is zero.*",  # val_dataloader during fit
        ".*in eval mode at the start of training.*",  # see PolicyModule.configure_model
        "You're resuming from a checkpoint that ended before the epoch ended.*",  # RolloutDataModule keeps the rest
        "Experiment logs directory .* exists.*",  # metrics.csv is kept, see metrics/table.py
        "Checkpoint directory .* exists and is not empty.*",  # the resumed run's own
        "The dirpath has changed from .*",  # a run's folder may be moved
        "Using ModelCheckpoint with manual optimization and every_n_train_steps.*",  # saving after the step is intended
        "Be aware that when using `ckpt_path`.*",  # validate does not use those callbacks
        ".*reduce_op.*",  # vLLM's own use of torch
        ".*LeafSpec.*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", about)
