"""The command that continues a run in its folder, from the command that was given."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from popo_lightning.core.config_options import existing_file, given_configs


def continue_command(args: Sequence[str], folder: str, began_from: str | None = None) -> list[str]:
    """The arguments of a command that resumes a run from the newest checkpoint in its folder.

    Args:
        args: Arguments of the command that was given.
        folder: Folder of the run.
        began_from: Checkpoint of another run that the run began from, if its folder has no checkpoint yet.
    """
    kept = without_options(args, "--run.folder", "--run.resume", "--ckpt_path")
    if began_from is not None:
        kept += ["--ckpt_path", began_from]
    elif any(_names_checkpoint(config) for _, _, config in given_configs(kept)):
        kept += ["--ckpt_path", "null"]  # overrides the file's
    return [*kept, "--run.folder", folder, "--run.resume", "true"]


def without_options(args: Sequence[str], *names: str) -> list[str]:
    """A command's arguments without some options and their values."""
    found: list[str] = []
    dropped = False  # whether the next argument is a dropped option's value
    for arg in map(str, args):
        if not dropped and arg.partition("=")[0] not in names:
            found.append(arg)
        dropped = not dropped and arg in names
    return found


def _names_checkpoint(config: str) -> bool:
    """Whether a config file, or inline YAML, sets ckpt_path; those of the package never do."""
    text = config
    with suppress(OSError, UnicodeDecodeError):  # also of inline YAML, which may be too long for a path
        if (file := existing_file(config)) is not None:
            text = Path(file).read_text(encoding="utf-8")
    with suppress(yaml.YAMLError):
        content = yaml.safe_load(text)
        return isinstance(content, dict) and content.get("ckpt_path") is not None
    return False
