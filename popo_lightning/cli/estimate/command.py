"""The subcommand `popo estimate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(args: Sequence[str]) -> int:
    """Runs the subcommand.

    Returns:
        Exit code: 0; the process ends with 2 if something could not be estimated.
    """
    from popo_lightning.cli.estimate.options import estimate_options

    asked = estimate_options(args)  # answers --help before torch is imported
    from popo_lightning.cli.parser import refuse
    from popo_lightning.cli.quiet_libraries import quieten
    from popo_lightning.core.errors import SettingError

    quieten()
    try:
        if refusals := _of_checkpoint(asked) if asked.instrument is None else _of_behavior(asked):
            refuse("; ".join(refusals))
    except SettingError as error:
        refuse(str(error))
    return 0


def _of_checkpoint(asked: argparse.Namespace) -> list[str]:
    """Prints the estimates of a checkpoint.

    Returns:
        One refusal for each benchmark that is not estimated.
    """
    from pathlib import Path

    from popo_lightning.cli.estimate.judgment import Choices, judged
    from popo_lightning.cli.estimate.logged import evaluations_of, logged_benchmarks
    from popo_lightning.cli.estimate.scoring import Judged
    from popo_lightning.cli.estimate.words import judgment_lines, plain, refusal
    from popo_lightning.cli.export.saved_policy import saved_policy
    from popo_lightning.evaluation.files import write_json

    saved = saved_policy(asked.source[0], asked.best)
    own = [] if saved.run is None else [str(saved.run)]
    folders: list[Path] = []
    for place in asked.from_ or own:
        folders += evaluations_of(place, asked.iteration, saved.iterations if place in own else None)
    benchmarks = logged_benchmarks(folders, asked.benchmark)
    policy = Judged(saved, asked.base)
    choices = Choices(asked.max_weight, asked.abstraction, asked.last, asked.seed)
    refusals, numbers = [], {}
    for benchmark in benchmarks:
        policy.check(benchmark.groups)
        temperature = asked.temperature or benchmark.temperature
        found = judged(policy.trajectories(benchmark.groups, temperature, asked.reward), choices)
        numbers[benchmark.name] = plain(found, benchmark, temperature)
        if found.refused:
            refusals.append(refusal(found, benchmark))
        else:
            print("\n".join(judgment_lines(found, benchmark, temperature)))
    if asked.json is not None:
        origin = {"checkpoint": str(saved.checkpoint), "iteration": saved.iterations, "from": list(map(str, folders))}
        write_json(Path(asked.json), origin | {"reward": asked.reward, "benchmarks": numbers})
    return refusals


def _of_behavior(asked: argparse.Namespace) -> list[str]:
    from popo_lightning.cli.estimate.action import parsed
    from popo_lightning.cli.estimate.hinted_rows import hinted_rows
    from popo_lightning.cli.estimate.instrument import effect
    from popo_lightning.cli.estimate.words import effect_lines

    rows = hinted_rows(asked.source, asked.instrument, parsed(asked.action), asked.reward)
    found = effect(rows.hinted, rows.acts, rows.rewards, rows.problems)
    print("\n".join(effect_lines(found, asked.instrument, asked.action, asked.reward)))
    return []
