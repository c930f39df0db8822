"""Reads a run as the page shows it: its identity, numbers, evaluations and groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

from popo_lightning.cli.show.groups import Groups, evaluated_groups, trained_groups
from popo_lightning.cli.show.images import data_urls
from popo_lightning.cli.show.run_files import (
    CONFIG,
    LARGEST_DOCUMENT,
    RECORD,
    SUMMARY,
    Skipped,
    check_run,
    document,
    evaluations,
    finite,
    metric_rows,
)
from popo_lightning.core.errors import SettingError
from popo_lightning.core.hidden_secrets import HIDDEN, is_secret, shown, shown_command

MAX_POINTS = 1000  # points per curve; a screen has no more
MAX_SETTINGS = 1000
MAX_CHARACTERS = 500  # characters per setting


@dataclass(frozen=True)
class Limits:
    """How much of a run goes into the page.

    Args:
        samples: Maximum number of responses from samples.jsonl.
        evaluated: Maximum number of responses of the last evaluation.
        images: Maximum number of images of prompts.
    """

    samples: int
    evaluated: int
    images: int


def read_run(folder: Path, name: str, limits: Limits) -> dict[str, Any]:
    """Reads everything that a run has written so far.

    Args:
        folder: Folder of the run.
        name: Name of the run in legends.
        limits: How much of the run goes into the page.

    Raises:
        SettingError: The folder holds no run, or a run without numbers and responses.
    """
    check_run(folder)
    skipped = Skipped()
    rows = metric_rows(folder, skipped)
    results = evaluations(folder, skipped)
    trained = trained_groups(folder, limits.samples, skipped)
    in_training = [each for each in results if each["label"].startswith("iteration-")]
    last = in_training[-1] if in_training else results[-1] if results else None
    evaluated = evaluated_groups(folder, last, limits.evaluated, skipped) if last else Groups()
    groups = trained.shown + evaluated.shown
    if not rows and not groups and not results:
        raise SettingError(
            f"RUN is '{folder}', where neither an iteration nor a response has been written{_damage(skipped)}; wait "
            "until its first iteration ends"
        )
    images, images_left = data_urls(folder, groups, limits.images)
    record, summary = document(folder, RECORD, skipped), document(folder, SUMMARY, skipped)
    return {
        "name": name,
        "folder": str(folder),
        **_identity(folder, record, summary, rows, skipped),
        "columns": columns(rows),
        "evaluations": results,
        "groups": groups,
        "images": images,
        "skipped": skipped,
        "leftOut": {
            "samples": trained.left_out,
            "evaluated": evaluated.left_out,
            "images": images_left,
        },
    }


def _damage(skipped: Skipped) -> str:
    return "".join(f" ({count} damaged lines in {name})" for name, count in skipped.items())


def _identity(
    folder: Path,
    record: Mapping[str, Any],
    summary: Mapping[str, Any],
    rows: Mapping[int, Mapping[str, float]],
    skipped: Skipped,
) -> dict[str, Any]:
    told = {name: record.get(name, summary.get(name)) for name in ("method", "task", "seed")}
    settings = _settings(folder, record, skipped)
    origin = record.get("origin")
    return {name: "" if value is None else str(value) for name, value in told.items()} | {
        "command": _command(folder, record),
        "finished": bool(summary),
        "iterations": max(rows, default=0),
        "wallSeconds": finite(summary.get("wall_seconds")),
        "origin": str(origin.get("checkpoint")) if isinstance(origin, dict) else "",
        "settings": {name: HIDDEN if is_secret(name) else shown(value) for name, value in settings.items()},
    }


def _command(folder: Path, record: Mapping[str, Any]) -> str:
    command = record.get("command")
    if isinstance(command, str) and command:
        return shown_command(command)
    return f"popo fit --config {quote(str(folder / CONFIG))}" if (folder / CONFIG).is_file() else ""


def _settings(folder: Path, record: Mapping[str, Any], skipped: Skipped) -> dict[str, str]:
    """All settings of config.yaml by dotted name, else those in run.json."""
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size <= LARGEST_DOCUMENT:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            content = yaml.load(path.read_text("utf-8", errors="replace"), loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            return dict(islice(_leaves("", content), MAX_SETTINGS))  # YAML aliases can make many settings of few
        skipped[CONFIG] += 1
    settings = record.get("settings")
    return {str(name): str(value) for name, value in settings.items()} if isinstance(settings, dict) else {}


def _leaves(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Texts by dotted name. The depth is limited, since YAML aliases can make an endless tree."""
    nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    if depth > 30:
        yield name, "..."
    elif isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), below, depth + 1)
    elif nested:
        for place, below in enumerate(value):
            yield from _leaves(f"{name}.{place}", below, depth + 1)
    else:
        yield name, _brief(value)


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value[:100]))}]"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:MAX_CHARACTERS]


def columns(rows: Mapping[int, Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Numbers of metrics.csv by name, with their iterations as "step". Very many iterations are binned.

    Args:
        rows: Numbers by iteration.
    """
    steps = list(rows)
    width = -(-len(steps) // MAX_POINTS)
    bins = [steps[start : start + width] for start in range(0, len(steps), width)] if steps else []
    names = sorted({name for row in rows.values() for name in row})
    found: dict[str, list[float | None]] = {"step": [float(of_bin[-1]) for of_bin in bins]}
    for name in names:
        found[name] = [_of_bin(name, [rows[step][name] for step in of_bin if name in rows[step]]) for of_bin in bins]
    return found


def _of_bin(name: str, values: Sequence[float]) -> float | None:
    if not values:
        return None
    if name.startswith(("total/", "eval/")) or name == "train/optimizer_steps":
        value = values[-1]
    else:
        value = max(values) if name.endswith("_max") else sum(values) / len(values)
    return float(f"{value:.6g}")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Shortest distinct ends of the paths, such as popo-seed1, or countdown/popo-seed1 if two share that name."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
