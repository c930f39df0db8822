"""LightningCLI over policy, rollouts and callbacks: its settings, and the order of a run's parts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from popo_lightning.callbacks.checkpoints import Checkpoints
from popo_lightning.callbacks.closing_block import closing_sentences
from popo_lightning.callbacks.early_stops import EarlyStops
from popo_lightning.callbacks.health import Health
from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.callbacks.one_checkpoint import OneCheckpoint
from popo_lightning.callbacks.opening_words import opening_sentences
from popo_lightning.callbacks.progress import Progress
from popo_lightning.callbacks.run_keeper import RunKeeper
from popo_lightning.callbacks.samples import SampleTable
from popo_lightning.callbacks.stop_signals import StopSignals
from popo_lightning.callbacks.summary import Summary
from popo_lightning.callbacks.tensorboard import TensorBoardLayout
from popo_lightning.callbacks.time_limit import at_the_end_of_an_iteration
from popo_lightning.cli.class_faults import import_fault
from popo_lightning.cli.class_names import import_classes
from popo_lightning.cli.config_files import check_config_files
from popo_lightning.cli.help_texts import add_help_all
from popo_lightning.cli.parser import OneSentenceParser
from popo_lightning.cli.parser_sentences import GROUPS
from popo_lightning.cli.plan.command import PlanOptions, print_plan, warn_of_memory
from popo_lightning.cli.run_parts import WholeFitLoop, check_parts, listed, making, parts_to_plan
from popo_lightning.cli.setting_texts import FILLED, check_checkpoints, check_slots, check_texts
from popo_lightning.cli.shipped_configs import with_config_names
from popo_lightning.cli.trainer_settings import (
    check_cpu_devices,
    check_nodes,
    check_root,
    check_seed,
    check_trainer,
    chosen_accelerator,
    lightnings_refusals,
)
from popo_lightning.core.errors import SettingError
from popo_lightning.core.number_settings import check_numbers
from popo_lightning.core.trainer_callbacks import callbacks_of
from popo_lightning.data import RolloutDataModule
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.metrics.table import loggers
from popo_lightning.model.sharding import check_checkpoint, check_sharding, settle_strategy
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.parameter_hook import ParameterHook
from popo_lightning.proximal.snapshot import ProximalPolicy
from popo_lightning.runs.evaluation_start import folder_of_run, settle_evaluation
from popo_lightning.runs.folder import note_nodes
from popo_lightning.runs.start import settle
from popo_lightning.runs.stopping import too_late_in_words
from popo_lightning.runs.wanted_run import RunSettings, wanted_run


class PopoCLI(LightningCLI):
    """The command line: fixed classes at the top, class_path wherever users extend.

    Args:
        args: Arguments of the command.
        claims: Holds the run's folders during the run.
    """

    parser_kind = OneSentenceParser

    def __init__(self, args: Sequence[str], claims: ExitStack | None = None) -> None:
        self.claims = ExitStack() if claims is None else claims
        self.plan = PlanOptions()
        self.args = list(args)
        super().__init__(
            PolicyModule,
            RolloutDataModule,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # a checkpoint's settings must not override the command line's
            parser_kwargs={"prog": "popo"},
            args=self.args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes the usual parser, with errors in one sentence."""
        import_classes()
        self.parser_class = self.parser_kind
        return super().init_parser(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Adds only the called subcommand: making four parsers takes long. Error messages make the others."""
        every, called = self.subcommands(), next(iter(self.args), "")
        if called not in every:
            super()._add_subcommands(parser, **kwargs)
            return
        self.subcommands = lambda: {called: every[called]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)
        self.subcommands = lambda: every  # type: ignore[method-assign]
        parser.others = lambda: {  # type: ignore[attr-defined]
            name: self._prepare_subcommand_parser(L.Trainer, name) for name in every if name != called
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        add_help_all(parser)
        if subcommand == "fit":
            self.plan.add_to(parser)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run, and links the values that two classes share."""
        parser.add_class_arguments(RunSettings, "run")
        # This is the order of their hooks: metrics before the callbacks that show them, checkpoints always last.
        parser.add_lightning_class_args(Monitor, "monitor")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(ParameterHook, "parameter_hook", subclass_mode=True, required=False)
        parser.add_lightning_class_args(ProximalPolicy, "proximal", subclass_mode=True, required=False)
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {name: {"class_path": usual} for name, usual in FILLED.items()}
            | {
                "checkpoint.every_n_epochs": 20,
                "checkpoint.save_on_train_epoch_end": True,
                "trainer.max_epochs": 100,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_progress_bar": False,
                "trainer.enable_model_summary": False,
                "trainer.use_distributed_sampler": False,
                "trainer.logger": True,
                "trainer.log_every_n_steps": 1,
            }
        )
        parser.link_arguments("data.temperature", "model.temperature")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks config files, then parses without Lightning's warning about arguments beside those of the process."""
        check_config_files(args, GROUPS)
        try:
            self.config = parser.parse_args(args)
        except (Exception, SystemExit) as error:
            fault = import_fault(error)
            if fault is None or isinstance(error, SettingError):
                raise
            raise fault from error

    def instantiate_classes(self) -> None:
        """Turns refusals of Lightning's classes, and of loggers without their package, into one sentence."""
        with making(self.parser, self.config[str(self.subcommand)]):
            super().instantiate_classes()

    def _set_seed(self) -> None:
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let a checkpoint's settings override the command line's."""

    def before_instantiate_classes(self) -> None:
        """Refuses settings that would be silently wrong, and decides where the run writes."""
        config = self.config[str(self.subcommand)]
        check_numbers(config)
        check_texts(config)
        check_checkpoints(config.checkpoint)
        check_slots(config)
        check_trainer(config.trainer)
        note_nodes(config.trainer.num_nodes)
        if self.subcommand == "fit":
            check_root(config.trainer.default_root_dir, config.run.folder)
        card = self.plan.card()
        if self.plan.asked:
            print_plan(card, config, *parts_to_plan(self._parser(self.subcommand), config))
            sys.exit(0)
        if self.subcommand == "fit":
            self._settle_folder(config)
        else:
            self._settle_evaluation(config)

    def _settle_evaluation(self, config: Any) -> None:
        run = config.run
        run.folder = folder_of_run(run.folder, map(str, config.config or ()))
        folder, checkpoint = settle_evaluation(run, config.seed_everything, config.ckpt_path)
        config.ckpt_path = None if checkpoint is None else str(checkpoint)
        config.trainer.logger = False
        self.save_config_callback = None  # the folder may be a run's and have its own config.yaml
        config.trainer.default_root_dir = config.trainer.default_root_dir or str(folder)

    def _settle_folder(self, config: Any) -> None:
        if config.run.resume:
            config.run.folder = folder_of_run(config.run.folder, map(str, config.config or ()))
        plain = json.loads(self._parser("fit").dump(config, skip_none=False, format="json", skip_validation=True))
        self.wanted = wanted_run(config, plain)
        self.start = start = settle(self.wanted, self.claims)
        config.run.folder = config.trainer.default_root_dir = str(start.folder)
        self.asked = config.clone()  # for config.yaml, which must stay valid in another folder and after a resume
        self.asked.trainer.default_root_dir = None
        self.asked.ckpt_path = start.record.origin["checkpoint"] if start.record.origin else None
        config.ckpt_path = None if start.checkpoint is None else str(start.checkpoint)
        config.checkpoint.dirpath = str(start.checkpoints)

    def _command(self) -> str | None:
        """The command that trains this run; None if there is none."""
        return shlex.join(["popo", *with_config_names(self.args)])

    def _save_config(self, path: Path) -> None:
        self._parser("fit").save(
            self.asked, path, skip_none=False, skip_validation=True, overwrite=True, multifile=False
        )

    def before_fit(self) -> None:
        """Refuses settings that make no sense together, before a model loads."""
        check_parts(self.model, self.datamodule, self.trainer, self.trainer.strategy.checkpoint_io)
        self._check_strategy()
        if self.trainer.is_global_zero:
            warn_of_memory(self.config["fit"], self.model, self.datamodule, self.trainer.strategy.root_device)

    def after_fit(self) -> None:
        """Reports what became of the checkpoints, and answers a signal that came too late.

        Raises:
            NothingSavedError: The run leaves nothing to resume from.
        """
        for sentence in closing_sentences(self.trainer, self.start.record, self.start.folder):
            print(f"popo: {sentence}", file=sys.stderr)
        late = too_late_in_words(self.datamodule.stopping)
        if late is not None and self.trainer.is_global_zero:
            print(f"popo: {late}", file=sys.stderr)

    def _check_strategy(self) -> None:
        """Sets up the strategy and refuses settings that it does not support."""
        strategy = self.trainer.strategy
        check_nodes(self.trainer)
        settle_strategy(strategy, self.trainer.world_size)
        check_sharding(strategy, self.trainer.world_size)
        check_checkpoint(self.config[str(self.subcommand)].ckpt_path, strategy)

    before_validate = before_test = before_predict = _check_strategy

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the run's loggers and its summary."""
        config = self.config_init[str(self.subcommand)]
        kwargs["accelerator"] = chosen_accelerator(config.trainer.accelerator)
        if kwargs["accelerator"] == "cpu":
            check_cpu_devices(config.trainer.devices)
        if self.subcommand == "fit":
            self.save_config_callback = None  # RunKeeper saves it later
            record = replace(self.start.record, command=self._command())
            opening = partial(opening_sentences, self.start, method=config.run.method)
            keeper = RunKeeper(record, self._save_config, self.start.forks, opening)
            # the keeper comes first, since an evaluation may take hours
            kwargs["callbacks"] = [keeper, *listed(config.trainer.callbacks)]
            if config.trainer.logger is not False:
                kwargs["logger"] = loggers(self.start.folder, self.start.behind, config.trainer.logger)
            stops = EarlyStops(self.wanted.stopping, self.start.forks)
            more: list[Any] = [stops, TensorBoardLayout(record), Summary(record)]
            if config.trainer.max_time is not None:
                more.append(at_the_end_of_an_iteration(config.trainer.max_time))
                kwargs["max_time"] = None
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": more}
        with lightnings_refusals():
            trainer: L.Trainer = super().instantiate_trainer(**kwargs)
        same = OneCheckpoint(self.config[str(self.subcommand)].ckpt_path, self.subcommand == "fit" and self.start.forks)
        callbacks_of(trainer)[:0] = [StopSignals(), same]  # signals always come first
        trainer.fit_loop.__class__ = WholeFitLoop
        return trainer
