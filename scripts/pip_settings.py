"""Prints pip's indexes, certificates and constraints as variables of uv, one a line, for scripts/setup.sh.

Usage: PYTHON scripts/pip_settings.py, with the environment's Python

uv does not read pip's configuration. `pip config list` names its files and variables, and a variable wins over a file.
Variables, unlike arguments, keep the passwords of indexes from other users of the machine. uv searches all indexes for
the best version then, as pip does. The script ends with code 1 if pip has a setting that has no equal here.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys

VARIABLES = {  # of uv by pip's setting, with what separates several values there
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "no-index": ("UV_NO_INDEX", " "),
}
DECISIVE = {"proxy", "only-binary", "no-binary", "require-hashes", "require-virtualenv", "client-cert", "pre"}


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


def variables(pip: dict[str, str]) -> list[str]:
    """Returns the variables of uv for settings of pip, each as NAME=VALUE.

    Raises:
        ValueError: uv has no equal of a setting.
    """
    if untold := sorted(DECISIVE & pip.keys()):
        raise ValueError(f"uv is not told of pip's setting {untold[0]}")
    told = [(name, separator.join(pip[key].split())) for key, (name, separator) in VARIABLES.items() if key in pip]
    return ["UV_INDEX_STRATEGY=unsafe-best-match", *(f"{name}={value}" for name, value in told)]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    try:
        print("\n".join(variables(settings(listing.stdout))))
    except ValueError as error:
        sys.exit(f"pip_settings: {error}")
