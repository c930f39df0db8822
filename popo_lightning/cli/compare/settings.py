"""The settings of a comparison: methods, seeds and settings, and the checks that load nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from popo_lightning.cli.shipped_configs import config_path
from popo_lightning.core.errors import SettingError
from popo_lightning.runs.record import leaves

Metric = Literal["avg_at_k", "greedy", "pass_at_k"]
METRICS: tuple[Metric, ...] = ("greedy", "avg_at_k", "pass_at_k")
OWN = ("config", "ckpt_path", "seed_everything", "run.folder", "run.root", "run.method", "run.resume")
# Not Any: the parser would then turn a mapping with a class_path into a class. With these types it stays data.
Setting = None | bool | int | float | str | list | dict
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Method:
    """One method.

    Args:
        config: YAML files after the task's.
        arguments: Settings of this method's runs, by dotted name.
        seeds: Seeds of this method instead of the common ones.
    """

    config: list[str] = field(default_factory=list)
    arguments: dict[str, Setting] = field(default_factory=dict)
    seeds: list[int] | None = None


@dataclass
class Comparison:
    """Methods x seeds on a task.

    Args:
        name: Name of the comparison, for titles and the folder.
        task: YAML files that every run begins with.
        methods: The methods by name, each with config (YAML files), arguments (settings) and seeds, all optional.
        seeds: Seeds of every method.
        arguments: Settings of every run, by dotted name, such as {trainer.max_epochs: 160}.
        sweep: Settings to vary, by label, such as {low: {model.optimizer.init_args.lr: 3.0e-5}}. The runs are methods x
            labels x seeds. null varies nothing. Settings of a method and of a label override the common ones.
        root: Folder of the runs and of the report; null uses runs/compare/NAME.
        baseline: Method to which the others are compared; null for none.
        dynamic_sampling: Method whose number of responses is the reference for the others; null for none.
        frontier: Method whose sweep labels differ in how often responses are trained on, such as by data.ppo_epochs.
            The report fits the responses needed against that reuse; null leaves it out.
        metric: Accuracy shown in curves, targets and sweeps.
        target: Target accuracy; null uses the baseline's final accuracy at the same seed.
        final_evaluations: Number of last evaluations whose mean is the final accuracy.
        at_once: Number of concurrent runs, each a process of its own; several small ones fill one GPU. On a CPU set
            OMP_NUM_THREADS to the cores of each.
        seconds_per_run: Time limit per run in seconds; a run that exceeds it is stopped and counts as failed. null sets
            no limit.
        report_only: Run nothing; report what has finished.
        plots: Draw figures; needs matplotlib.
    """

    name: str
    task: list[str]
    methods: dict[str, Method]
    seeds: list[int]
    arguments: dict[str, Setting] = field(default_factory=dict)
    sweep: dict[str, dict[str, Setting]] | None = None
    root: str | None = None
    baseline: str | None = None
    dynamic_sampling: str | None = None
    frontier: str | None = None
    metric: Metric = "avg_at_k"
    target: float | None = None
    final_evaluations: int = 2
    at_once: int = 1
    seconds_per_run: float | None = None
    report_only: bool = False
    plots: bool = True

    @property
    def folder(self) -> Path:
        """Folder of the runs and of the report."""
        return Path(self.root) if self.root is not None else Path("runs") / "compare" / self.name

    def variants(self) -> Mapping[str, dict[str, Any]]:
        """Settings of the sweep by label; a single empty label if nothing is swept."""
        return self.sweep or {"": {}}

    def check(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            SettingError: A name, file, seed or number cannot be used.
        """
        self._check_names()
        self._check_files()
        given = {"arguments": self.arguments}
        given |= {f"sweep.{label}": varied for label, varied in (self.sweep or {}).items()}
        given |= {f"methods.{name}.arguments": method.arguments for name, method in self.methods.items()}
        for place, settings in given.items():
            for name in flattened(settings):
                if name in OWN:
                    raise SettingError(f"{place} sets {name}, which popo compare sets itself; leave it out")
        for label, varied in (self.sweep or {}).items():
            for name, method in self.methods.items():
                for both in flattened(varied).keys() & flattened(method.arguments).keys():
                    raise SettingError(
                        f"{both} is set by sweep.{label} and by methods.{name}.arguments; set it in one of them"
                    )
        own = {f"methods.{name}.seeds": each.seeds for name, each in self.methods.items() if each.seeds is not None}
        for place, seeds in {"seeds": self.seeds, **own}.items():
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise SettingError(f"{place} is {seeds}; name one seed or more, none twice, none below 0")
        self._check_numbers()

    def _check_numbers(self) -> None:
        limit, target = self.seconds_per_run, self.target
        for name, fine, remedy in (
            ("final_evaluations", self.final_evaluations >= 1, "average 1 evaluation or more"),
            ("at_once", self.at_once >= 1, "use at least 1"),
            ("seconds_per_run", limit is None or limit > 0, "use a positive number of seconds, or null"),
            ("target", target is None or 0 < target <= 1, "name an accuracy above 0 and up to 1, or null"),
        ):
            if not fine:
                raise SettingError(f"{name} is {getattr(self, name)}; {remedy}")

    def _check_names(self) -> None:
        if not self.methods:
            raise SettingError("methods is empty; name one method or more")
        for place, name in [
            ("name", self.name),
            *(("methods", name) for name in self.methods),
            *(("sweep", label) for label in self.sweep or {}),
        ]:
            if not NAME.fullmatch(name):
                raise SettingError(
                    f"{place} has the name '{name}', which cannot be a folder's; use letters, digits, '.', '_' and '-'"
                )
        named = {"baseline": self.baseline, "dynamic_sampling": self.dynamic_sampling, "frontier": self.frontier}
        for place, wanted in named.items():
            if wanted is not None and wanted not in self.methods:
                raise SettingError(f"{place} is '{wanted}'; name one of methods ({', '.join(self.methods)}), or null")

        if self.frontier is not None and len(self.variants()) < 3:
            raise SettingError(
                f"frontier is '{self.frontier}', but sweep has {len(self.sweep or {})} labels; a law needs three "
                "settings or more that train on responses differently often, such as data.ppo_epochs 1, 2 and 4"
            )

    def _check_files(self) -> None:
        lists = [("task", self.task), *((f"methods.{name}.config", each.config) for name, each in self.methods.items())]
        for place, files in lists:
            for file in files:
                if not Path(config_path(file)).is_file():
                    raise SettingError(
                        f"{place} has '{file}', which does not exist; name YAML files from the current folder, or "
                        "those that popo configs lists"
                    )


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name.

    A mapping below a dotted name is the value of that setting. A mapping below a plain name comes from the command line
    (--arguments.trainer.max_epochs 10) and overrides settings with the same dotted name.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= leaves(name, value) if "." not in name else {name: value}
    return found
