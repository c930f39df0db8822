"""The slot of a policy that is built on first use and cached by its recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from popo_lightning.core.cache import cache_folder
from popo_lightning.core.errors import SettingError, reason

# Policies that come with the package, by name and recipe; scripts/ship_policies.py makes them.
SHIPPED = Path(__file__).parent.parent / "toys" / "policies"


class WarmStart(ABC):
    """Builds a policy's model folder once and finds it again by a hash of its recipe."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Readable part of the folder's name."""

    @abstractmethod
    def recipe(self) -> dict[str, object]:
        """Everything that decides the weights, in plain JSON types."""

    @property
    def address(self) -> str:
        """Name of the folder; another recipe has another name."""
        digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.name}-{digest}"

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Writes model and tokenizer into an empty folder."""

    def config(self) -> Any:
        """The model's configuration from transformers; a recipe that knows it without building overrides this."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder())

    def folder(self) -> Path:
        """The folder shipped for this recipe, else the one built before, else one built now.

        An interrupted build leaves no folder: a draft is moved into place when it is complete. If several processes ask
        at once, one builds. The build runs on the CPU, in every device context.
        """
        target = self.place()
        if not target.exists():
            try:
                self.build_at(target)
            except (OSError, SafetensorError) as error:
                raise SettingError(
                    f"model.warm_start cannot write the policy that it builds to '{target.parent}' ({reason(error)}); "
                    "name a folder with room that can be written to in the environment variable POPO_CACHE"
                ) from error
        return target

    @property
    def knows_config(self) -> bool:
        """Whether :meth:`config` needs no built folder."""
        return type(self).config is not WarmStart.config

    def place(self) -> Path:
        """Path of the folder, built or not: in the package or in the cache."""
        shipped = SHIPPED / self.address
        return shipped if shipped.is_dir() else cache_folder() / self.address

    def build_at(self, target: Path) -> None:
        """Builds a draft and moves it into place when it is complete.

        Args:
            target: Folder that does not exist yet.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                draft = target.with_name(f"{target.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                with torch.device("cpu"):
                    self.build(draft)
                draft.rename(target)
