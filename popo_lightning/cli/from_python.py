"""``popo_lightning.fit`` and ``validate``: run the command line's commands from a script or a notebook."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from signal import SIGINT
from typing import Any

import lightning as L
from jsonargparse import Namespace

from popo_lightning.cli.parser import RaisingParser
from popo_lightning.cli.popo_cli import PopoCLI
from popo_lightning.cli.quiet_libraries import quieten
from popo_lightning.cli.shipped_configs import config_path, shipped
from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError, own_refusal
from popo_lightning.core.scalars import plain_scalar
from popo_lightning.core.trainer_callbacks import callback_of
from popo_lightning.evaluation.callback import Evaluation
from popo_lightning.metrics.table import METRICS, numbers_by_iteration
from popo_lightning.policy import PolicyModule
from popo_lightning.runs.record import CONFIG
from popo_lightning.runs.resume import RunFinished
from popo_lightning.runs.stopping import Stopped

Config = str | os.PathLike[str]
ASKED = ("plan", "card_gib", "print_config", "help", "help_all")  # options that end the command or need another one
Reward = str | Callable[..., Any] | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class FinishedRun:
    """Results of a run.

    Args:
        folder: Folder of the run, with everything that `popo fit` writes.
        summary: Contents of summary.json.
        metrics: One dict per iteration from metrics.csv, with its metrics and those of the evaluation after it.
        policy: The trained policy.
        trainer: Lightning's trainer.
    """

    folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    policy: PolicyModule
    trainer: L.Trainer


class PythonCLI(PopoCLI):
    """The command line, but it raises errors instead of printing them, and takes a function as the reward.

    Args:
        args: Arguments of the command.
        claims: Holds the run's folders during the run.
        reward: Setting of the verifier; None keeps the task's.
    """

    parser_kind = RaisingParser

    def __init__(self, args: Sequence[str], claims: ExitStack, reward: Any) -> None:
        self.reward = reward
        super().__init__(args, claims)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses as usual, then sets the reward as the task's verifier, or wraps a task that has none."""
        super().parse_arguments(parser, args)
        if self.reward is None:
            return
        data = self.config[self.config.subcommand].data
        if "verifier" in data.task.init_args:
            data.task.init_args.verifier = self.reward
        else:
            inside = Namespace(task=data.task, verifier=self.reward)
            data.task = Namespace(class_path="popo_lightning.tasks.regraded.Regraded", init_args=inside)

    def _command(self) -> str | None:
        """A reward is named in the run's config.yaml alone, and no command finds what a script or notebook defines."""
        own = f"popo fit --config {quote(str(self.start.folder / CONFIG))}"
        command = super()._command() if self.reward is None else own
        return None if "__main__" in f"{command} {self.reward}" else command


def fit(
    task: Config | None = None,
    method: Config | None = None,
    *,
    configs: Sequence[Config] = (),
    reward: Reward | None = None,
    **settings: Any,
) -> FinishedRun:
    """Trains a policy, as `popo fit` does; may be called several times in a process.

    Ctrl-C stops the run where it can be resumed, writes its checkpoint and raises KeyboardInterrupt.

    Args:
        task: Shipped name, such as "countdown_tiny", or a YAML file.
        method: Shipped name, such as "popo", or a YAML file.
        configs: Further configurations; each overrides those before it.
        reward: Grades responses in place of the task's verifier: a function, the address of one (my_rewards.py:shout),
            or a list of either and of dicts with function and weight.
        **settings: Settings that override all configurations. A dict stands for YAML, ``trainer={"max_epochs": 3}``; a
            dotted name is an option of the command line, ``**{"model.behave_weight.cap": 2}``.

    Raises:
        SettingError: A setting cannot work; the message is one sentence.
    """
    cli = _run("fit", task, method, configs, reward, settings)
    folder = Path(cli.trainer.default_root_dir)
    summary, table = folder / "summary.json", folder / METRICS
    return FinishedRun(
        folder,
        json.loads(summary.read_text()) if summary.exists() else {},
        [{"step": float(step)} | row for step, row in numbers_by_iteration(table).items()] if table.exists() else [],
        cli.model,
        cli.trainer,
    )


def validate(
    task: Config | None = None,
    method: Config | None = None,
    *,
    configs: Sequence[Config] = (),
    reward: Reward | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Evaluates a policy, or a run's newest checkpoint, as `popo validate` does, and returns the metrics by name.

    Args:
        task: Same as for :func:`fit`.
        method: Same as for :func:`fit`.
        configs: Same as for :func:`fit`; a run's config.yaml, for example.
        reward: Same as for :func:`fit`.
        **settings: Same as for :func:`fit`.

    Raises:
        SettingError: A setting cannot work; the message is one sentence.
    """
    cli = _run("validate", task, method, configs, reward, settings)
    found = callback_of(cli.trainer, Evaluation)
    return found.latest.metrics() if found is not None and found.latest is not None else {}


def _run(
    subcommand: str,
    task: Config | None,
    method: Config | None,
    configs: Sequence[Config],
    reward: Reward | None,
    settings: Mapping[str, Any],
) -> PopoCLI:
    _check_asked(subcommand, settings)
    elsewhere = any(name.partition(".")[0] in ("config", "data") for name in settings)  # the task may be there
    if task is None and not configs and not elsewhere and (method is None or not Path(method).is_file()):
        raise SettingError(
            f'task is None, but a run needs one; name it, as popo_lightning.{subcommand}("countdown_tiny", "popo"), '
            "where popo configs lists more"
        )
    if isinstance(configs, str | os.PathLike):
        raise SettingError(f"configs is {str(configs)!r}; give a list, as [{str(configs)!r}]")
    args = [subcommand]
    for room, name in (("task", task), ("method", method), *(("", name) for name in configs)):
        args += [] if name is None else ["--config", _file(room, name)]
    args += _options(settings)
    asked = _address(reward)
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # where the user's own classes and functions are found, as popo does
    with ExitStack() as claims, _errors(), warnings.catch_warnings():
        quieten()
        return PythonCLI(args, claims, asked)


def _check_asked(subcommand: str, settings: Mapping[str, Any]) -> None:
    """Raises SettingError for an option of the command line that is no setting."""
    for name in ASKED:
        if name in settings:
            raise SettingError(
                f"{name} is {settings[name]}, but popo_lightning.{subcommand} takes settings alone; leave it out, or "
                f"ask the command line for it by popo {subcommand} ... --{name}"
            )


@contextmanager
def _errors() -> Iterator[None]:
    """Raises every refusal as SettingError and every Ctrl-C as KeyboardInterrupt, however they arrive."""
    try:
        yield
    except ValueError as error:
        refusal = own_refusal(error)
        if refusal is None or refusal is error:
            raise
        raise refusal from error
    except RunFinished as finished:
        raise SettingError(str(finished)) from None
    except Stopped as stop:
        if stop.number != SIGINT:
            raise
        raise KeyboardInterrupt from stop
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # how Lightning passes it on
            raise KeyboardInterrupt from None
        raise


def _file(room: str, name: Config) -> str:
    """Path of a configuration."""
    given = os.fspath(name)
    known = shipped()
    path = config_path(f"{room}/{given}" if f"{room}/{given}" in known else given)
    if not Path(path).is_file():
        names = [one.removeprefix(f"{room}/") for one in known if one.startswith(room)]
        remedy = did_you_mean(given, names, "popo configs lists those that come with the package")
        raise SettingError(f"{room or 'configs'} is '{given}', which is no file and no shipped configuration; {remedy}")
    return path


def _options(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings as command-line arguments: dicts as one inline YAML, the others as options."""
    nested = {name: value for name, value in settings.items() if isinstance(value, Mapping) and "." not in name}
    if nested:
        yield from ("--config", json.dumps({name: _plain(value, name) for name, value in nested.items()}))
    for name, value in settings.items():
        if name not in nested:
            plain = _plain(value, name)
            yield f"--{name}={plain if isinstance(plain, str) else json.dumps(plain)}"


def _plain(value: Any, name: str) -> Any:
    """Converts a value to what YAML can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one, f"{name}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = plain_scalar(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise SettingError(
        f"{name} is a {type(value).__name__}, which config.yaml could not keep; give numbers, texts, lists and dicts, "
        'a class as {"class_path": "my_module.MyClass", "init_args": {...}}, or build lightning.Trainer yourself'
    )


def _address(reward: Any) -> Any:
    """Setting of the verifier that names a function by its address."""
    if isinstance(reward, str) and ":" not in reward:
        raise SettingError(f"reward is '{reward}'; give a function, or its address as my_rewards.py:{reward or 'near'}")
    if reward is None or isinstance(reward, str):
        return reward
    if isinstance(reward, Mapping):
        return dict(reward) | {"function": _address(reward.get("function"))}
    if isinstance(reward, list | tuple):
        return [_address(one) for one in reward]
    name = getattr(reward, "__qualname__", type(reward).__name__)
    if not name.isidentifier() or isinstance(reward, type) or not hasattr(reward, "__qualname__"):
        raise SettingError(
            f"reward is {name}, which cannot be found by its name; define it by def, at the top level of a file, "
            "script or notebook"
        )
    if getattr(sys.modules.get(reward.__module__), name, None) is not reward:
        raise SettingError(
            f"reward is {name}, but the {name} of {reward.__module__} is another one; give it a name of its own"
        )
    return f"{reward.__module__}:{name}"
