"""Makes small new images of prompts: a file that a run names is shown only if it is a picture, and never unchanged."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST_FILE = 20 * 2**20  # bytes
LARGEST_PICTURE = 50_000_000  # pixels
SIDE = 448  # maximum side of a picture in the page, in pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def data_urls(folder: Path, groups: Iterable[dict[str, Any]], limit: int) -> tuple[dict[str, str], int]:
    """Data URLs of the images that groups name, by that name.

    Args:
        folder: Folder of the run. Relative paths are looked up there, then in the current folder.
        groups: Groups as the page reads them.
        limit: Maximum number of images.

    Returns:
        The images shown, and the number of further ones; missing files do not count.
    """
    found: dict[str, str] = {}
    left_out = 0
    for name in dict.fromkeys(name for group in groups for name in group["images"]):
        path = next((path for path in (folder / name, Path(name)) if _is_usable(path)), None)
        if path is None:
            continue
        if len(found) >= limit:
            left_out += 1
        elif (url := _data_url(path)) is not None:
            found[name] = url
    return found, left_out


def _is_usable(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= LARGEST_FILE
    except (OSError, ValueError):  # a name that no file can have
        return False


def _data_url(path: Path) -> str | None:
    """Data URL of a smaller copy; None if the file is no picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > LARGEST_PICTURE:
                return None
            small = picture.convert("RGB")
    except Exception:  # damaged bytes may raise any exception
        return None
    small.thumbnail((SIDE, SIDE))
    files = []
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        small.save(file, kind)
        files.append((kind, file.getvalue()))
    kind, smallest = min(files, key=lambda each: len(each[1]))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(smallest).decode()}"
