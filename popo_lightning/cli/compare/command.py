"""The subcommand `popo compare`: reads settings, runs the planned runs and writes the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace
from rich.console import Console

from popo_lightning.cli.compare.checking import check_commands
from popo_lightning.cli.compare.collection import collect, metric_name
from popo_lightning.cli.compare.curves import read_run
from popo_lightning.cli.compare.plan import PlannedRun, is_finished, plan
from popo_lightning.cli.compare.plots import check_plots, draw
from popo_lightning.cli.compare.report import facts, main_sections, write_report
from popo_lightning.cli.compare.runs import Outcome, run_all
from popo_lightning.cli.compare.settings import Comparison, Method
from popo_lightning.cli.config_files import check_comparison_files, check_config_files
from popo_lightning.cli.parser import OneSentenceParser, refuse
from popo_lightning.cli.quiet_libraries import quieten
from popo_lightning.core.errors import SettingError

DESCRIPTION = "Runs methods x seeds on a task, one or several at a time, and reports. Resumes if interrupted."
INTERRUPTED = 130


def main(args: Sequence[str]) -> int:
    """Runs the subcommand.

    Returns:
        Exit code: 0, 1 if a run failed, or 130 if it was interrupted.
    """
    quieten()
    try:
        comparison = parsed(args)
        comparison.check()
        if comparison.plots:
            check_plots()
        return compare(comparison)
    except SettingError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        again = shlex.join(["popo", "compare", *args])
        print(f"popo: stopped; finished runs are kept; interrupted ones continue with: {again}", file=sys.stderr)
        return INTERRUPTED


def parser() -> OneSentenceParser:
    """Parser of the subcommand."""
    made = OneSentenceParser(prog="popo compare", description=DESCRIPTION)
    made.add_argument("-c", "--config", action=ActionConfigFile, help="YAML with the settings below; may be repeated.")
    made.add_class_arguments(Comparison)
    return made


def parsed(args: Sequence[str]) -> Comparison:
    """Settings from the command line and the files it names."""
    check_config_files(args)
    check_comparison_files(args)
    found = parser().parse_args(list(args))
    values = {name: value for name, value in vars(found).items() if name != "config"}
    methods = {name: Method(**vars(m)) if isinstance(m, Namespace) else m for name, m in values.pop("methods").items()}
    return Comparison(methods=methods, **values)


def compare(comparison: Comparison) -> int:
    """Runs the planned runs that are not finished, then reports on all finished ones."""
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def accuracy(run: PlannedRun) -> str:
        result = read_run(run.folder, run.arm, run.seed)
        value = result.final(comparison.metric, comparison.final_evaluations)
        return f"final {metric_name(comparison.metric, [result])} {value:.3f}"

    planned = plan(comparison)
    outcomes: list[Outcome] = []
    if not comparison.report_only:
        check_commands([run for run in planned if not is_finished(run)])
        outcomes = run_all(planned, console.print, accuracy, comparison.at_once, comparison.seconds_per_run)
    failures = [outcome for outcome in outcomes if outcome.state == "failed"]
    report(comparison, planned, failures)
    elsewhere = sum(outcome.state == "elsewhere" for outcome in outcomes)
    if elsewhere:
        console.print(f"{elsewhere} runs are under way in another process; add --report_only true when they are done")
    if failures:
        print(f"popo: {len(failures)} of {len(outcomes)} runs failed, see above", file=sys.stderr)
    return 1 if failures else 0


def report(comparison: Comparison, planned: Sequence[PlannedRun], failures: Sequence[Outcome]) -> None:
    """Collects the runs, draws the figures, writes the report and prints the main tables."""
    found = collect(comparison, planned)
    figures = draw(found) if comparison.plots and found.runs else {}
    files: list[Path] = write_report(found, failures, figures)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a log file is not as narrow as a terminal
    for line in facts(found):
        console.print(line, markup=False)
    for section in main_sections(found) if found.runs else []:
        console.print("", section.table.for_terminal(), crop=False)
    console.print("")
    for file in [*files, *(comparison.folder / name for name in figures)]:
        console.print(str(file), soft_wrap=True, markup=False)
