"""An exported folder on the hub of Hugging Face, by its own client."""

from __future__ import annotations

from pathlib import Path

from popo_lightning.core.errors import SettingError, reason


class NotTakenError(RuntimeError):
    """The folder is whole, and the hub has not taken it."""


def check_hub(name: str) -> None:
    """Raises SettingError where nothing can be uploaded, before anything is written.

    Args:
        name: Of the repository, with or without its owner.
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
    """Uploads a folder; a repository that is not there yet is made, private.

    Args:
        folder: Whole.
        name: Of the repository.

    Returns:
        Its address.

    Raises:
        NotTakenError: It is not all there.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except Exception as error:  # whatever a network does
        raise NotTakenError(
            f"'{folder}' is whole, but the hub did not take it ({reason(error)}); try again by: hf upload {name} "
            f"{folder}"
        ) from error
    return str(made)
