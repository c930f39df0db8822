"""The model that a run began with, which gives a policy its configuration, tokenizer and processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lightning.cli.export.built_classes import built
from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model.files import check_model_files
from popo_lightning.model.policy_checkpoint import FOLDER, REVISION

# files that a policy needs of a model on the hub: configurations, tokenizer, chat templates
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class BaseModel:
    """The model that a run began with.

    Args:
        name: Name for readers: the hub id, or the name of the folder or of the warm start.
        folder: Folder with configuration and tokenizer; of a model on the hub, the cached files of its revision.
        revision: Commit on the hub, or the digest of a warm start's recipe; None if unknown.
        hub_id: Hub id; None for a folder.
    """

    name: str
    folder: Path
    revision: str | None
    hub_id: str | None

    @property
    def address(self) -> str:
        """Hub id or folder, for error messages."""
        return self.hub_id or str(self.folder)

    def config(self) -> Any:
        """The model's configuration.

        Raises:
            SettingError: No configuration loads from the folder.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # a damaged file may raise any exception
            raise SettingError(
                f"the run's model '{self.name}' gives no configuration ({reason(error)}); name its folder or hub id by "
                "--base"
            ) from error

    def generation_config(self, config: Any) -> Any:
        """The model's generation config, or the one that transformers makes of its configuration.

        Args:
            config: Configuration of the model.
        """
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.folder)
        except OSError:
            return GenerationConfig.from_model_config(config)


def base_model(saved: SavedPolicy, given: str | None = None) -> BaseModel:
    """Finds the model that a checkpoint's run began with.

    Args:
        saved: The checkpoint.
        given: Place of the model, if the run's own settings no longer have it.

    Raises:
        SettingError: The model is gone, or nothing says which it was.
    """
    if given is not None:
        return _named(given, "--base", may_be_hub=True)
    path = saved.setting("model.path")
    if path is not None:
        revision = saved.state.get(REVISION)
        if isinstance(revision, str):  # whatever folder has the same name here
            return _of_hub(str(path), revision)
        recorded = saved.state.get(FOLDER)
        there = isinstance(recorded, str) and Path(recorded).exists()  # wherever the run was started
        return _named(str(recorded if there else path), "model.path of the run", may_be_hub=False)
    settings = saved.setting("model.warm_start")
    if settings is None:
        raise SettingError(
            f"the checkpoint '{saved.checkpoint}' does not say which model its run began with; name it by --base"
        )
    start = built(WarmStart, settings, "model.warm_start")  # type: ignore[type-abstract]
    found = of_warm_start(start)
    if found is None:
        raise gone(start, "which has its configuration and tokenizer", ", or name its folder by --base")
    return found


def of_warm_start(start: WarmStart) -> BaseModel | None:
    """The model that a warm start has built; None if its folder is gone."""
    folder = start.place()
    return BaseModel(start.name, folder, start.address.rpartition("-")[2], None) if folder.exists() else None


def gone(start: WarmStart, why: str, or_else: str = "") -> SettingError:
    """The refusal of a warm start whose folder is gone.

    Args:
        start: The warm start.
        why: Why the folder is needed, as a clause.
        or_else: Another remedy than the cache that has it.
    """
    return SettingError(
        f"the policy that model.warm_start of the run built is no longer in '{start.place()}', {why}; set POPO_CACHE "
        f"to the cache that has it{or_else}"
    )


def weights_folder(began: BaseModel) -> Path:
    """A folder with its weights: of the hub, those of its revision.

    Args:
        began: The model.

    Raises:
        SettingError: The hub does not give them.
    """
    if began.hub_id is None:
        return began.folder
    for kind in ("*.safetensors", "*.bin"):
        found = _cached(began.hub_id, began.revision, "its weights are needed", kind)
        if any(found.glob(kind)):
            break
    return found


def _named(name: str, setting: str, may_be_hub: bool) -> BaseModel:
    path = Path(name).expanduser()
    if path.exists():
        check_model_files(path)
        return BaseModel(path.resolve().name, path, None, None)
    if not may_be_hub or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SettingError(
            f"{setting} is '{name}', which is no longer there, and the configuration and tokenizer come from it; "
            "name the folder or hub id that has them by --base"
        )
    return _of_hub(name, None)


def _of_hub(hub_id: str, revision: str | None) -> BaseModel:
    folder = _cached(hub_id, revision, "the configuration and tokenizer come from it")
    return BaseModel(hub_id, folder, revision or folder.name, hub_id)


def _cached(hub_id: str, revision: str | None, why: str, *kinds: str) -> Path:
    """The folder with a hub model's small files and those of some kinds, from the cache or from the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*SMALL, *kinds]))
    except Exception as error:  # no network, or no such model
        at = f" at revision {revision}" if revision else ""
        raise SettingError(
            f"the run's model '{hub_id}'{at} is neither cached nor given by the hub ({reason(error)}), and {why}; name "
            "a folder that has them by --base"
        ) from error
