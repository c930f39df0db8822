"""Reads responses that evaluations kept with tokens and log-probs; the files are not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.response_rows import log_probs, rows_of, token_ids
from popo_lightning.runs.folder import EVALUATIONS, RESULTS, holds_run


@dataclass(frozen=True)
class LoggedBenchmark:
    """Sampled responses to a benchmark's problems.

    Args:
        name: Name of the benchmark.
        temperature: Sampling temperature; the log-probs are those of that distribution.
        iterations: Iterations of the policies that sampled the responses.
        groups: One group per problem, with the responses of all evaluations.
        draws: What decides the draws: evaluation.seed, and with evaluation.new_draws also the iteration.
    """

    name: str
    temperature: float
    iterations: tuple[int, ...]
    groups: Sequence[Group]
    draws: str = ""


def evaluations_of(place: str, iterations: Sequence[int], newest: int | None) -> list[Path]:
    """Finds the folders of evaluations.

    Args:
        place: A run's folder, or the folder of an evaluation.
        iterations: Iterations of the run to take; empty takes the newest.
        newest: Last iteration to consider; None takes any.

    Raises:
        SettingError: There is no such evaluation.
    """
    path = Path(place).expanduser()
    if (path / RESULTS).is_file():
        if iterations:
            raise SettingError(
                f"--iteration is {iterations[0]}, but --from is '{place}', which is one evaluation; leave --iteration "
                "out, or name the run's folder"
            )
        return [path]
    if not path.is_dir() or not holds_run(path):
        raise SettingError(f"--from is '{place}', which is no run's folder and no evaluation's; name either")
    found = {
        int(file.parent.name.removeprefix("iteration-")): file.parent
        for file in (path / EVALUATIONS).glob(f"iteration-*/{RESULTS}")
        if file.parent.name.removeprefix("iteration-").isdecimal()
    }
    there = ", ".join(map(str, sorted(found))) or "none"
    if missing := [number for number in iterations if number not in found]:
        raise SettingError(
            f"--iteration is {missing[0]}, but the run in '{place}' was evaluated after {there}; name one"
        )
    past = [number for number in found if newest is None or number <= newest]
    if not iterations and not past:
        raise SettingError(
            f"the run in '{place}' has no evaluation that is no newer than the checkpoint (there is {there}); name "
            "another run by --from"
        )
    return [found[number] for number in (sorted(set(iterations)) or [max(past)])]


def logged_benchmarks(folders: Sequence[Path], only: str | None = None) -> list[LoggedBenchmark]:
    """Reads all kept responses of evaluations, by benchmark; the responses to one problem are joined.

    Args:
        folders: Folders of the evaluations.
        only: Name of the only benchmark to read; None reads all.

    Raises:
        SettingError: No tokens were kept, a file is damaged, or the responses cannot be weighted.
    """
    found: dict[str, list[LoggedBenchmark]] = {}
    for folder in folders:
        for benchmark in _in_folder(folder, only):
            found.setdefault(benchmark.name, []).append(benchmark)
    if not found:
        there = ", ".join(f"'{folder}'" for folder in folders)
        of = "" if only is None else f" of benchmark '{only}'"
        raise SettingError(
            f"the evaluation in {there} has no responses{of} with tokens and log-probs; evaluate with "
            "evaluation.keep_responses 500 (problems), and name that run or evaluation by --from"
        )
    return [_together(parts) for parts in found.values()]


def _together(parts: Sequence[LoggedBenchmark]) -> LoggedBenchmark:
    first = parts[0]
    if len({part.temperature for part in parts}) > 1:
        raise SettingError(
            f"the responses to benchmark '{first.name}' were sampled at several temperatures, "
            f"{', '.join(f'{part.temperature:g}' for part in parts)}; name one evaluation by --iteration or --from"
        )
    _check_draws(parts)
    groups: dict[str, Group] = {}
    for group in (group for part in parts for group in part.groups):
        known = groups.setdefault(group.problem.id, group)
        if known is not group:
            if not torch.equal(known.prompt_ids, group.prompt_ids):
                raise SettingError(
                    f"problem '{group.problem.id}' of benchmark '{first.name}' has other prompt tokens in one "
                    "evaluation than in another; name evaluations of one task and one tokenizer by --from"
                )
            known.responses.extend(group.responses)
    iterations = tuple(sorted({number for part in parts for number in part.iterations}))
    return LoggedBenchmark(first.name, first.temperature, iterations, list(groups.values()))


def _check_draws(parts: Sequence[LoggedBenchmark]) -> None:
    """Raises SettingError if evaluations drew alike: near copies of a response would count as independent ones."""
    known: dict[str, LoggedBenchmark] = {}
    for part in parts:
        if (twin := known.setdefault(part.draws, part)) is not part:
            seed = part.draws.partition("/")[0]
            raise SettingError(
                f"the evaluations after iterations {twin.iterations[0]} and {part.iterations[0]} have the same draws "
                f"(evaluation.seed {seed}), so their responses do not count as independent; name one of "
                "them by --iteration or --from, or evaluate with evaluation.new_draws true or another evaluation.seed"
            )


def _in_folder(folder: Path, only: str | None) -> Iterator[LoggedBenchmark]:
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        iteration, settings = int(results["iteration"]), {n: b["settings"] for n, b in results["benchmarks"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(f"'{folder / RESULTS}' cannot be read ({reason(error)}); evaluate again") from error
    draws = f"{results.get('seed')}/{iteration}" if results.get("new_draws") is True else str(results.get("seed"))
    groups: dict[str, dict[str, Group]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in rows_of(file):
            if "token_ids" in row and only in (None, row.get("benchmark")):
                try:
                    _add(groups.setdefault(str(row["benchmark"]), {}), row, iteration)
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                    raise SettingError(f"line {number} of '{file}' is no kept response ({reason(error)})") from error
    for name, of_benchmark in groups.items():
        temperature = _temperature(name, settings.get(name, {}), folder)
        yield LoggedBenchmark(name, temperature, (iteration,), list(of_benchmark.values()), draws)


def _temperature(name: str, settings: Mapping[str, Any], folder: Path) -> float:
    where = f"benchmark '{name}' of '{folder}'"
    try:
        temperature, top_p, top_k = (float(settings[key]) for key in ("temperature", "top_p", "top_k"))
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(f"'{RESULTS}' does not say how {where} was sampled; evaluate again") from error
    if not 0 < temperature < math.inf:
        raise SettingError(
            f"{where} was sampled greedily, which tells nothing of other answers; sample at temperature 1"
        )
    if top_p < 1 or top_k > 0:
        raise SettingError(
            f"{where} was sampled with evaluation.top_p {top_p:g} and top_k {top_k:g}, so answers that they cut have "
            "no weight; evaluate with top_p 1 and top_k 0"
        )
    return temperature


def _add(groups: dict[str, Group], row: Mapping[str, Any], iteration: int) -> None:
    """Adds a row's response to its problem's group. The first row of a problem begins the group."""
    name = str(row["problem"])
    if row.get("images"):
        raise ValueError("it answers a prompt with images, which popo estimate does not read")
    if "prompt_ids" in row:
        if name in groups:
            raise ValueError(f"a second first response to problem {name}")
        problem = Problem(name, row["prompt"], row["answer"])
        groups[name] = Group(len(groups), problem, token_ids(row["prompt_ids"], "prompt_ids"), [], iteration)
    ids, logp = token_ids(row["token_ids"], "token_ids"), log_probs(row["behave_logp"])
    parts = {str(part): float(value) for part, value in row["parts"].items()}
    if not all(map(math.isfinite, parts.values())):
        raise ValueError("a reward that is not finite")
    text, failure = str(row["response"]), row.get("failure")
    groups[name].responses.append(Response(ids, logp, str(row["finish_reason"]), text, parts, failure))
