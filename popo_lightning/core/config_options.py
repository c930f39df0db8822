"""Finds the --config options of a command, and the files that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

OPTIONS = ("--config", "-c")
SUFFIXES = ("", ".yaml", ".yml")


def given_configs(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yields what --config or -c gets: index of the word, its `--config=` prefix, and the name or inline YAML."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option not in OPTIONS or not (equals or place + 1 < len(args)):
            continue
        yield (place, f"{option}=", value) if equals else (place + 1, "", args[place + 1])


def configs_first(args: Sequence[str]) -> list[str]:
    """Puts the --config options of a subcommand before its settings, which are over all files wherever they stand."""
    if not args or args[0].startswith("-"):
        return list(args)
    places = [
        at for place, before, _ in given_configs(args) if place for at in ((place,) if before else (place - 1, place))
    ]
    return [args[0], *(args[at] for at in places), *(arg for at, arg in enumerate(args) if at and at not in places)]


def existing_file(name: str) -> str | None:
    """Path of the file that a name means, whose suffix is optional; None if there is no such file."""
    return next((name + suffix for suffix in SUFFIXES if Path(name + suffix).is_file()), None)
