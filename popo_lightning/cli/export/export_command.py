"""The subcommand `popo export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from popo_lightning.core.errors import SettingError, reason

INTERRUPTED = 130


class NotTakenError(RuntimeError):
    """The folder is complete, but the hub did not take it."""


def main(args: Sequence[str]) -> int:
    """Runs the subcommand.

    Returns:
        Exit code: 0, 1 if the folder is complete but its upload failed, or 130 if it was interrupted.
    """
    from popo_lightning.cli.export.options import export_parser

    asked = export_parser().parse_args(args)  # answers --help before torch is imported
    from popo_lightning.cli.export.exported_folder import export
    from popo_lightning.cli.parser import refuse
    from popo_lightning.cli.quiet_libraries import quieten

    quieten()
    target = Path(asked.folder).expanduser()
    command = shlex.join(["popo", "export", *args])
    saved = None
    try:
        if asked.push_to_hub is not None:
            check_hub(asked.push_to_hub)
        saved = export(asked.source, target, command, asked.dtype, asked.best, asked.base, adapter=asked.adapter)
        print(f"exported {saved.checkpoint} (after iteration {saved.iterations}) to {target}", file=sys.stderr)
        if asked.push_to_hub is not None:
            print(f"uploaded to {push(target, asked.push_to_hub)}", file=sys.stderr)
    except SettingError as error:
        refuse(str(error))
    except NotTakenError as error:
        print(f"popo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = "is whole, but not uploaded" if saved is not None else "was not written"
        print(f"popo: stopped; {target} {left}", file=sys.stderr)
        return INTERRUPTED
    return 0


def check_hub(name: str) -> None:
    """Raises SettingError before anything is written if an upload cannot succeed.

    Args:
        name: Name of the repository, with or without its owner.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingError(f"--push_to_hub is '{name}', which is no name of a repository; use OWNER/NAME") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, or no network
        raise SettingError(
            f"--push_to_hub is '{name}', but the hub does not know who you are ({reason(error)}); log in by "
            "`hf auth login`, or export without it and upload the folder later"
        ) from error


def push(folder: Path, name: str) -> str:
    """Uploads a folder. A missing repository is created, as a private one.

    Args:
        folder: Complete folder.
        name: Name of the repository.

    Returns:
        Address of the repository.

    Raises:
        NotTakenError: The upload failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except Exception as error:  # a network may raise any exception
        raise NotTakenError(
            f"'{folder}' is whole, but the hub did not take it ({reason(error)}); try again by: "
            f"{shlex.join(['hf', 'upload', name, str(folder)])}"
        ) from error
    return str(made)
