"""The model that a run began with, which gives a policy its configuration, tokenizer and processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.export.built_classes import built
from popo_lightning.export.saved_policy import SavedPolicy
from popo_lightning.model.files import check_model_files
from popo_lightning.model.policy_checkpoint import REVISION

# what a policy needs of a model on the hub: configurations, tokenizer, chat templates
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class BaseModel:
    """The model that a run began with.

    Args:
        name: For readers: the hub id, the folder's name, or that of the warm start.
        folder: That its configuration and tokenizer load from: of the hub, the cached files of its revision.
        revision: Commit on the hub, or the recipe's digest of a warm start; None where it is not known.
        hub_id: None for a folder.
    """

    name: str
    folder: Path
    revision: str | None
    hub_id: str | None

    @property
    def weights_at(self) -> str | Path:
        """Folder or hub id that its weights load from, too, for an engine."""
        return self.hub_id or self.folder

    def config(self) -> Any:
        """Its configuration.

        Raises:
            SettingError: None loads from there.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # a damaged file fails in every way there is
            raise SettingError(
                f"the run's model '{self.name}' gives no configuration ({reason(error)}); name its folder or hub id by "
                "--base"
            ) from error

    def generation_config(self, config: Any) -> Any:
        """Its generation config, or what transformers makes of its configuration.

        Args:
            config: Its configuration.
        """
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.folder)
        except OSError:
            return GenerationConfig.from_model_config(config)


def base_model(saved: SavedPolicy, given: str | None = None) -> BaseModel:
    """The model that a checkpoint's run began with.

    Args:
        saved: The checkpoint.
        given: Where it is now, if the run's own settings do not say so.

    Raises:
        SettingError: It is gone, or nothing says which it was.
    """
    if given is not None:
        return _named(given, "--base", None)
    path = saved.setting("model.path")
    if path is not None:
        return _named(str(path), "model.path of the run", recorded_revision(saved))
    start = warm_start(saved)
    if start is None:
        raise SettingError(
            f"the checkpoint '{saved.checkpoint}' does not say which model its run began with; name it by --base"
        )
    folder = start.place()
    if not folder.exists():
        raise SettingError(
            f"the policy that model.warm_start of the run built is no longer in '{folder}', which has its "
            "configuration and tokenizer; set POPO_CACHE to the cache that has it, or name its folder by --base"
        )
    return BaseModel(start.name, folder, start.address.rpartition("-")[2], None)


def warm_start(saved: SavedPolicy) -> WarmStart | None:
    """What built the model that a run began with; None where it had model.path.

    Args:
        saved: The run's checkpoint.
    """
    settings = saved.setting("model.warm_start")
    return None if settings is None else built(WarmStart, settings, "model.warm_start")  # type: ignore[type-abstract]


def recorded_revision(saved: SavedPolicy) -> str | None:
    """Commit on the hub of the model that a run began with; None where it is not recorded."""
    found = saved.state.get(REVISION)
    return found if isinstance(found, str) else None


def _named(name: str, setting: str, revision: str | None) -> BaseModel:
    path = Path(name).expanduser()
    if path.exists():
        check_model_files(path)
        return BaseModel(path.resolve().name, path, None, None)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SettingError(
            f"{setting} is '{name}', which is no longer there, and the configuration and tokenizer come from it; "
            "name the folder or hub id that has them by --base"
        )
    return _of_hub(name, revision)


def _of_hub(hub_id: str, revision: str | None) -> BaseModel:
    """Its files but the weights, from the cache or from the hub."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(SMALL)))
    except Exception as error:  # no network, or no such model
        at = f" at revision {revision}" if revision else ""
        raise SettingError(
            f"the run's model '{hub_id}'{at} is neither cached nor given by the hub ({reason(error)}), and the "
            "configuration and tokenizer come from it; name a folder that has them by --base"
        ) from error
    return BaseModel(hub_id, folder, revision or folder.name, hub_id)
