"""What a run says at its end of how to use its policy."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L

from popo_lightning.callbacks.checkpoint_writing import keeps_none, only_tries

EXPORTED = "exported"  # folder inside the run's that is proposed


def export_words(trainer: L.Trainer) -> str | None:
    """The command that exports the policy; None for a run that keeps no checkpoint.

    Args:
        trainer: Whose training has ended.
    """
    kept: Any = trainer.checkpoint_callback
    if kept is None or keeps_none(kept) or only_tries(trainer) or trainer.state.fn != "fit":
        return None
    run = Path(trainer.default_root_dir)
    command = shlex.join(["popo", "export", str(run), str(run / EXPORTED)])
    return f"export the policy for transformers and vLLM by: {command}"
