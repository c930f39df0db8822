"""Prints pip's indexes, certificates and constraints as arguments of `uv pip install`, one a line.

scripts/setup.sh reads them.

Usage: PYTHON scripts/pip_settings.py, with the environment's Python

uv does not read pip's configuration. `pip config list` names its files and variables, and a variable wins over a file.
uv searches all indexes for the best version then, as pip does.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys

FLAGS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}


def settings(listing: str) -> dict[str, str]:
    """Returns the settings of pip by name, from lines such as `global.index-url='https://...'`.

    A section of a command (install) wins over global, and the environment over both.
    """
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        section, dot, name = key.rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section)
        if separator and dot and rank is not None and rank >= found.get(name, (0, ""))[0]:
            found[name] = (rank, ast.literal_eval(value))
    return {name: value for name, (_, value) in found.items()}


def arguments(pip: dict[str, str]) -> list[str]:
    """Returns the arguments of uv for settings of pip; each value of a list has an argument of its own."""
    out = ["--index-strategy", "unsafe-best-match"]
    for name, flag in FLAGS.items():
        for value in pip.get(name, "").split():
            out += [flag, value]
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        out.append("--no-index")
    return out


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    print("\n".join(arguments(settings(listing.stdout))))
