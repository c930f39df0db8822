"""The folder in which expensive results are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder of built policies and of answers already checked: ``$POPO_CACHE``, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "popo_lightning"
    return Path(os.environ.get("POPO_CACHE", default))
