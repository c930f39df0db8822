"""What ends a run: sentences about its checkpoints, and a block with its places and the commands that continue it."""

from __future__ import annotations

import itertools
import math
import shlex
from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Timer

from popo_lightning.callbacks.checkpoint_writing import keeps_none, only_tries
from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.callbacks.early_stops import EarlyStops
from popo_lightning.callbacks.run_keeper import RunKeeper
from popo_lightning.callbacks.time_limit import TimeLimit
from popo_lightning.core.errors import NothingSavedError
from popo_lightning.core.trainer_callbacks import callback_of, callbacks_of
from popo_lightning.runs.continue_command import continue_command, without_options
from popo_lightning.runs.record import RunRecord

EXPORTED, BEST = "exported", "exported-best"  # proposed folders for exports, inside the run's folder


def closing_sentences(trainer: L.Trainer, record: RunRecord, folder: Path) -> list[str]:
    """Sentences about checkpoints at the end of a run: what became of them, and which one to use.

    Raises:
        NothingSavedError: None of the run's checkpoints could be written, so that nothing of it is left to resume from.
    """
    found: list[str] = []
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        if isinstance(callback, Checkpoints):
            saved = callback.saved_so_far(trainer)
            if saved.failed and (saved.newest is None or record.began_from(saved.newest)):
                raise NothingSavedError(
                    f"{saved.failures()}; the numbers in '{folder}' are all that is left of this run; make room, or "
                    "name a folder by checkpoint.dirpath, and start it again"
                )
            found += callback.closing_words(trainer)
    return found


def closing_block(trainer: L.Trainer) -> dict[str, str]:
    """Places and commands at the end of a run, by purpose. Each command works, however the run ended and was saved."""
    run = Path(trainer.default_root_dir)
    found = {} if (why := ended_early(trainer)) is None else {"ended early": why}
    found["run folder"] = shlex.quote(str(run))
    keeps = trainer.checkpoint_callback
    kept = keeps if isinstance(keeps, Checkpoints) and not only_tries(trainer) else None
    saved = None if kept is None else kept.saved_so_far(trainer)
    newest = None if kept is None or saved is None or keeps_none(kept) else saved.newest
    if newest is not None:
        found["checkpoint"] = shlex.quote(str(_as_named(Path(newest), run)))
    found["curves"] = shlex.join(["tensorboard", "--logdir", str(run)])
    found["look inside"] = shlex.join(["popo", "show", str(run)])
    keeper = callback_of(trainer, RunKeeper)
    if kept is None or saved is None or newest is None or (keeper is not None and keeper.forks and not saved.written):
        return found  # nothing of this run
    found["export"] = shlex.join(["popo", "export", str(run), str(_free(run / EXPORTED))])
    if kept.monitor is not None:  # popo export decides which is the best, also by the evaluation after the last one
        found["export the best"] = shlex.join(["popo", "export", str(run), str(_free(run / BEST)), "--best"])
    if not saved.unusable and not _ends_at_once(trainer) and (command := longer(trainer, run)) is not None:
        found["train on"] = command
    return found


def longer(trainer: L.Trainer, run: Path) -> str | None:
    """The command that trains the run to its end, or for as many iterations again; None if it is unknown."""
    keeper = callback_of(trainer, RunKeeper)
    given = shlex.split(keeper.record.command or "") if keeper is not None else []
    if given[:2] != ["popo", "fit"] or not trainer.max_epochs or trainer.max_epochs < 0:
        return None
    kept = without_options(given, "--trainer.max_epochs")
    done = getattr(getattr(trainer, "datamodule", None), "iteration", trainer.max_epochs)
    target = trainer.max_epochs if done < trainer.max_epochs else 2 * trainer.max_epochs
    return shlex.join([*continue_command(kept, str(run)), "--trainer.max_epochs", str(target)])


def _ends_at_once(trainer: L.Trainer) -> bool:
    """Whether the resumed run would be ended again: by EarlyStopping, or by a Timer that keeps counting."""
    stops = callback_of(trainer, EarlyStops)
    kept = [timer for timer in callbacks_of(trainer) if isinstance(timer, Timer) and timer.state_dict()]
    return (stops is not None and stops.ended is not None) or any(map(_is_spent, kept))


def ended_early(trainer: L.Trainer) -> str | None:
    """Why a run ended before its last iteration, as a clause; None if it did not, or if the reason is unknown."""
    done = getattr(getattr(trainer, "datamodule", None), "iteration", 0)
    stops = callback_of(trainer, EarlyStops)
    if stops is not None and stops.why is not None:
        return f"after iteration {done}, by EarlyStopping: {stops.why}"
    spent = [timer for timer in callbacks_of(trainer) if isinstance(timer, Timer) and _is_spent(timer)]
    asked = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    if not spent or done >= asked:
        return None
    took = timedelta(seconds=round(spent[0].time_elapsed()))
    setting = "trainer.max_time" if isinstance(spent[0], TimeLimit) else "the Timer of trainer.callbacks"
    of = "" if asked == math.inf else f" of {asked}"
    return f"after iteration {done}{of}, by {setting}: it has trained for {took}"


def _is_spent(timer: Timer) -> bool:
    left = timer.time_remaining()
    return left is not None and left <= 0


def _as_named(checkpoint: Path, run: Path) -> Path:
    """A checkpoint's path that begins like the run's folder, if it is in there."""
    own = run.absolute()
    return run / checkpoint.relative_to(own) if checkpoint.is_relative_to(own) else checkpoint


def _free(folder: Path) -> Path:
    """The first of a name, name-2, name-3 and so on that nothing has."""
    later = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], later) if not path.exists())
