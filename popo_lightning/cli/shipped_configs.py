"""The configurations shipped with the package: found by name in any folder, listed and copied by `popo configs`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from popo_lightning.core.config_options import existing_file, given_configs
from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError

PACKAGE = Path(__file__).parent.parent
DESCRIPTION = """Lists the configurations that come with the package, or prints or copies one.

popo fit takes them by name from any folder: popo fit --config task/countdown_tiny --config method/popo"""


def shipped_folder() -> Path:
    """Folder of the configurations: beside the package in a checkout, inside the package if installed."""
    checkout = PACKAGE.parent / "configs"
    return checkout if (checkout / "method" / "popo.yaml").exists() else PACKAGE / "configs"


def shipped() -> dict[str, Path]:
    """Shipped files by name, such as method/popo, sorted by path."""
    folder = shipped_folder()
    return {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.glob("*/*.yaml"))}


def config_path(name: str) -> str:
    """Finds the file that a --config means: an existing one, else a shipped one; suffix and `configs/` are optional.

    Any other name is returned unchanged, for the error message.
    """
    if (own := existing_file(name)) is not None:
        return own
    file = shipped().get(_short(name))
    return name if file is None else shown_path(file)


def _short(name: str) -> str:
    """The name of a shipped file without `configs/` and suffix."""
    return str(Path(name)).removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")


def shown_path(file: Path) -> str:
    """A path relative to the current folder if the file is below it, else the path as it is."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def with_config_paths(args: Sequence[str]) -> list[str]:
    """Replaces the names given to --config by paths of files."""
    found = list(args)
    for place, before, name in named_configs(args):
        found[place] = before + (config_path(name) if name else name)
    return found


def with_config_names(args: Sequence[str]) -> list[str]:
    """Inverse of :func:`with_config_paths`, for commands that are shown: names shipped files by their short names."""
    names = {str(file.resolve()): name for name, file in shipped().items()}
    found = list(args)
    for place, before, path in named_configs(args):
        name = names.get(str(Path(path).resolve()))
        if name is not None and Path(config_path(name)).samefile(path):  # no file here hides the shipped one
            found[place] = before + name
    return found


def named_configs(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yields the names that --config or -c has (none inline): index of the word, its `--config=` prefix, and name."""
    for word, before, name in given_configs(args):
        if "\n" not in name and "{" not in name and ": " not in name:
            yield word, before, name


def about(file: Path) -> str:
    """First line of a file, if it is a comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def parser() -> argparse.ArgumentParser:
    """Parser of `popo configs`."""
    made = argparse.ArgumentParser("popo configs", description=DESCRIPTION, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("name", nargs="?", help="print this one, such as method/popo, or list a folder, such as method")
    made.add_argument("--copy", metavar="FILE", type=Path, help="write it to a file of your own instead")
    return made


def main(args: Sequence[str]) -> int:
    """Runs `popo configs`.

    Args:
        args: Arguments after the subcommand.
    """
    asked = parser().parse_args(list(args))
    try:
        _answer(asked.name, asked.copy)
    except SettingError as error:
        print(f"popo: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(given: str | None, copy: Path | None) -> None:
    """Lists configurations, or prints or copies the one that is named."""
    files = shipped()
    listed = {name: file for name, file in files.items() if (given or "").rstrip("/") in ("", name.split("/")[0])}
    if listed and copy is None:
        width = max(map(len, listed))
        for name, file in listed.items():
            print(f"{name:<{width}}  {about(file)}")
        return
    if given is None:
        raise SettingError("--copy needs the name of a configuration before it, such as method/popo")
    name = _short(given)
    if name not in files:
        remedy = did_you_mean(name, files, "popo configs lists them")
        raise SettingError(f"'{given}' is no shipped configuration; {remedy}")
    if copy is None:
        print(files[name].read_text(encoding="utf-8"), end="")
        return
    if copy.exists():
        raise SettingError(f"--copy is '{copy}', which exists; name a new file")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name], copy)
    except OSError as error:
        raise SettingError(f"--copy is '{copy}', which cannot be written ({error.strerror})") from error
    print(f"{copy} is a copy of {name}")
