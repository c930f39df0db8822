"""The subcommand `popo show`: makes one HTML file from folders of runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from popo_lightning import __version__
from popo_lightning.cli.show.html import GENERATOR, page
from popo_lightning.cli.show.runs import Limits, names_of, read_run
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.whole_files import replaced

MAX_RUNS = 12  # a chart with more lines is unreadable
DESCRIPTION = "Makes one HTML file of a run, or of several side by side: curves, evaluations, groups of responses."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"show: {message}; popo show --help describes its settings")


def main(args: Sequence[str]) -> int:
    """Runs the subcommand.

    Returns:
        Exit code: 0, or 2 after one sentence about a mistake.
    """
    try:
        wanted = parser().parse_args(list(args))
        _check(wanted)
        text, notes = made(wanted.runs, Limits(wanted.samples, wanted.evaluated, wanted.images))
        _write(wanted.output, text)
    except SettingError as error:
        print(f"popo: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    print(f"{wanted.output} ({len(text) / 2**20:.1f} MiB); open it in a browser")
    return 0


def parser() -> argparse.ArgumentParser:
    """Parser of the subcommand."""
    made = _Parser(prog="popo show", description=DESCRIPTION, allow_abbrev=False)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, under way or finished")
    made.add_argument("--output", type=Path, default=Path("show.html"), help="the file (default: %(default)s)")
    about = "responses of samples.jsonl at most, of each run; spread over its iterations (default: %(default)s)"
    made.add_argument("--samples", type=int, default=5000, help=about)
    about = "responses of the last evaluation at most, of each run; spread over its problems (default: %(default)s)"
    made.add_argument("--evaluated", type=int, default=2000, help=about)
    about = "images of prompts at most, of each run (default: %(default)s)"
    made.add_argument("--images", type=int, default=200, help=about)
    return made


def _check(wanted: argparse.Namespace) -> None:
    for name in ("samples", "evaluated", "images"):
        if getattr(wanted, name) < 0:
            raise SettingError(f"--{name} is {getattr(wanted, name)}; use 0 for none, or more")
    if len(wanted.runs) > MAX_RUNS:
        raise SettingError(f"RUN is given {len(wanted.runs)} times; name {MAX_RUNS} runs at most")
    output: Path = wanted.output
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise SettingError(f"--output is '{output}', which names no HTML file; use a name such as show.html")
    if not output.parent.is_dir():
        raise SettingError(f"--output is '{output}', whose folder does not exist; make it, or name another one")
    if output.exists() and GENERATOR not in output.read_text("utf-8", errors="replace")[:1000]:
        raise SettingError(f"--output is '{output}', which exists and is no page of popo show; name another file")


def made(runs: Sequence[Path], limits: Limits) -> tuple[str, list[str]]:
    """Text of the page, and notes on what it lacks.

    Args:
        runs: Folders of runs; one that is named twice counts once.
        limits: How much of each run goes into the page.

    Raises:
        SettingError: A folder holds no run, or a run without content.
    """
    folders = list({folder.resolve(): folder for folder in runs}.values())
    found = [read_run(folder, name, limits) for folder, name in zip(folders, names_of(folders), strict=True)]
    content: dict[str, Any] = {
        "version": __version__,
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
        "runs": found,
    }
    names = [run["name"] for run in found]
    return page(f"{', '.join(names)} - popo show", content), [note for run in found for note in notes_on(run)]


def notes_on(run: dict[str, Any]) -> list[str]:
    """Sentences about damaged lines and about what was left out."""
    damaged = [f"{run['name']}: skipped {count:,} damaged lines of {name}" for name, count in run["skipped"].items()]
    return damaged + [
        f"{run['name']}: left out {count:,} {what}; --{setting} shows more"
        for setting, what in (
            ("samples", "of the responses in samples.jsonl"),
            ("evaluated", "of the responses of the last evaluation"),
            ("images", "images"),
        )
        if (count := run["leftOut"][setting])
    ]


def _write(path: Path, text: str) -> None:
    try:
        with replaced(path) as file:
            file.write(text)
    except OSError as error:
        raise SettingError(f"--output is '{path}', which cannot be written ({reason(error)}); name another") from error
