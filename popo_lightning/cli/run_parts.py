"""The parts of a run, checked together before a model loads: by `popo fit` with its trainer, by the plan without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from types import SimpleNamespace
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.fit_loop import _FitLoop

from popo_lightning.cli.class_faults import Maker
from popo_lightning.cli.combinations import check_combination
from popo_lightning.cli.parser_sentences import Command, explained
from popo_lightning.cli.trainer_settings import check_callbacks
from popo_lightning.core.errors import SettingError, own_refusal, reason
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.data import RolloutDataModule
from popo_lightning.metrics.monitors import check_monitors, reports_are_ours
from popo_lightning.policy import PolicyModule
from popo_lightning.training.optimizers import check_optimizer


class WholeFitLoop(_FitLoop):
    """Lightning's fit loop, but training also begins and ends if a checkpoint has all iterations.

    The last evaluation and the summary then follow as after any training.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


@contextmanager
def making(parser: Any, config: Any) -> Iterator[None]:
    """Turns what classes, Lightning's among them, raise while a parser makes them into one sentence.

    Args:
        parser: Parser that makes the classes.
        config: Settings as parsed.
    """
    parser.maker = maker = Maker(config)
    try:
        yield
    except MisconfigurationException as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else "Lightning"
        raise SettingError(f"{owner} refuses its settings: {reason(error)}") from error
    except ValueError as error:
        if maker.refusal is not None and maker.refusal is not error:  # wrapped by jsonargparse
            raise maker.refusal from maker.refusal.__cause__
        nested = str(error).startswith(("Does not validate", "Problem with given"))
        if own_refusal(error) is not None or not nested:
            raise
        raise SettingError(explained(str(error), Command("popo"))) from error


def check_parts(
    policy: PolicyModule, data: RolloutDataModule, trainer: L.Trainer, checkpoint_io: CheckpointIO | None
) -> None:
    """Raises SettingError for parts that make no sense together, or that training cannot use.

    Args:
        policy: The policy, without a model.
        data: The data module.
        trainer: Trainer with all callbacks of the run.
        checkpoint_io: Writes the trainer's checkpoints.
    """
    check_combination(policy, data, callbacks_of(trainer))
    check_optimizer(policy.make_optimizer, policy.make_lr_scheduler)
    check_callbacks(callbacks_of(trainer), checkpoint_io)
    check_monitors(trainer, reports_are_ours(policy, data))


def parts_to_plan(parser: Any, config: Any) -> tuple[PolicyModule, RolloutDataModule]:
    """Makes policy, data and callbacks, and checks them like those of a run. A trainer may need another machine.

    Args:
        parser: Parser of `popo fit`.
        config: Settings as parsed.

    Raises:
        SettingError: `popo fit` would refuse them before a model loads.
    """
    kept = {name: config[name] for name in ("model", "data", *parser.callback_keys)}
    of_trainer = {name: config.trainer[name] for name in ("callbacks", "plugins")}
    with making(parser, config):
        made: Any = parser.instantiate_classes(Namespace(**kept, trainer=Namespace(**of_trainer)))
    callbacks = [*listed(made.trainer.callbacks), *(made[name] for name in parser.callback_keys)]
    writers = [plugin for plugin in listed(made.trainer.plugins) if isinstance(plugin, CheckpointIO)]
    trainer: Any = SimpleNamespace(callbacks=callbacks)
    check_parts(made.model, made.data, trainer, writers[0] if writers else None)
    return made.model, made.data


def listed(given: Any) -> Sequence[Any]:
    """The objects of a setting that may be one, a list, or null."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]
