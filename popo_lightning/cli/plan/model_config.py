"""Reads a model's configuration and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.policy import PolicyModule

NAME = "config.json"
SECONDS = 5.0  # timeout of the hub


def model_config(policy: PolicyModule) -> Any:
    """The transformers configuration of a policy, from its recipe, its folder, the hub's cache or the hub.

    Raises:
        SettingError: There is no configuration, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if policy.warm_start is not None:
        return policy.warm_start.config()
    folder = Path(policy.folder)
    if folder.is_dir():
        if not (folder / NAME).exists():
            raise SettingError(f"model.path is '{folder}', a folder without {NAME}; the plan needs that file alone")
    else:
        folder = _from_hub(str(policy.folder)).parent
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any exception
        raise SettingError(
            f"model.path is '{policy.path}', whose {NAME} transformers does not read: {reason(error)}"
        ) from error


def _from_hub(name: str) -> Path:
    """Path of a hub id's config.json: the cached one if there is one, else the hub's, which is asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, NAME)
        if isinstance(cached, str):
            return Path(cached)
        # asked once, before the download, which would retry
        get_hf_file_metadata(hf_hub_url(name, NAME), timeout=SECONDS)
        return Path(hf_hub_download(name, NAME, etag_timeout=SECONDS))
    except Exception as error:  # no such name, no access, no network, or told to stay offline
        raise SettingError(
            f"model.path is '{name}', no folder here, and its {NAME}, which is all that the plan needs, is neither "
            f"cached nor to be had from the hub ({reason(error, 120)}); run once with a network, or set model.path to "
            f"a folder with {NAME}"
        ) from error
