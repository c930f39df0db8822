"""Writes data files and makes tasks that read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from helpers.verifiers import AcceptsAll
from popo_lightning.tasks.dataset import DatasetTask
from popo_lightning.verifiers.base import Verifier

ROW = {"prompt": "What is 1+1?", "answer": "2"}


def png(width: int = 4, height: int = 3, kind: str = "PNG") -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, *rows: Any) -> Path:
    """Writes rows as JSON lines. A row of bytes is written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def task(*train: Any, verifier: Verifier | None = None, **settings: Any) -> DatasetTask:
    sources = [source if isinstance(source, dict) else {"path": str(source)} for source in train]
    return DatasetTask(verifier or AcceptsAll(), sources, settings.pop("benchmarks", {}), **settings)  # type: ignore[arg-type]
