"""The configurations shipped with the package: found by name from any folder, listed and copied by `popo configs`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from popo_lightning.core.nearest import did_you_mean

PACKAGE = Path(__file__).parent.parent
OPTIONS = ("--config", "-c")
SUFFIXES = ("", ".yaml", ".yml")
DESCRIPTION = """Lists the configurations that come with the package, or prints or copies one.

popo fit takes them by name from any folder: popo fit --config task/countdown_tiny --config method/popo"""


def shipped_folder() -> Path:
    """Where they lie: in a checkout beside the package, in an installed package inside it."""
    checkout = PACKAGE.parent / "configs"
    return checkout if (checkout / "method" / "popo.yaml").exists() else PACKAGE / "configs"


def shipped() -> dict[str, Path]:
    """Files by name, such as method/popo, in the order of their folders."""
    folder = shipped_folder()
    return {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.glob("*/*.yaml"))}


def config_path(name: str) -> str:
    """The file that a --config means: one here, or else a shipped one, with or without suffix and `configs/` before it.

    A name that is neither comes back as it is, for the sentence about it.
    """
    for suffix in SUFFIXES:
        if Path(name + suffix).is_file():
            return name + suffix
    parts = Path(name).parts
    inside = Path(*parts[1:]) if parts[:1] == ("configs",) and len(parts) > 1 else Path(name)
    file = shipped().get(str(inside.with_suffix("") if inside.suffix in SUFFIXES else inside))
    return name if file is None else _shown(file)


def _shown(file: Path) -> str:
    """A path as short as it can be said from here."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def with_config_paths(args: Sequence[str]) -> list[str]:
    """A command line whose --config names are files."""
    found = list(args)
    for place, before, name in named_configs(args):
        found[place] = before + (config_path(name) if name else name)
    return found


def named_configs(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """What a command line names by --config or -c, and does not write inline: the word, its `--config=`, the name."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option not in OPTIONS or not (equals or place + 1 < len(args)):
            continue
        word, before, name = (place, f"{option}=", value) if equals else (place + 1, "", args[place + 1])
        if "\n" not in name and "{" not in name and ": " not in name:
            yield word, before, name


def about(file: Path) -> str:
    """A file's first line, if it is a comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def main(args: Sequence[str]) -> int:
    """`popo configs`.

    Args:
        args: What follows the subcommand.
    """
    parser = argparse.ArgumentParser("popo configs", description=DESCRIPTION, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", help="print this one, such as method/popo, or list a folder, such as method")
    parser.add_argument("--copy", metavar="FILE", type=Path, help="write it to a file of your own instead")
    asked = parser.parse_args(list(args))
    files = shipped()
    listed = {name: file for name, file in files.items() if (asked.name or "").rstrip("/") in ("", name.split("/")[0])}
    if listed and asked.copy is None:
        width = max(map(len, listed))
        for name, file in listed.items():
            print(f"{name:<{width}}  {about(file)}")
        return 0
    if asked.name is None:
        print("popo: --copy needs the name of a configuration before it, such as method/popo", file=sys.stderr)
        return 2
    name = asked.name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    if name not in files:
        remedy = did_you_mean(name, files, "popo configs lists them")
        print(f"popo: '{asked.name}' is no shipped configuration; {remedy}", file=sys.stderr)
        return 2
    if asked.copy is None:
        print(files[name].read_text(encoding="utf-8"), end="")
        return 0
    if asked.copy.exists():
        print(f"popo: --copy is '{asked.copy}', which exists; name a new file", file=sys.stderr)
        return 2
    try:
        asked.copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name], asked.copy)
    except OSError as error:
        print(f"popo: --copy is '{asked.copy}', which cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{asked.copy} is a copy of {name}")
    return 0
