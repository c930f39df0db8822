"""Images that rows name or contain, checked before they are used."""

from __future__ import annotations

import math
import warnings
from io import BytesIO
from pathlib import Path

MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class BadValue(Exception):  # noqa: N818  # concerns one row, not the program
    """A row gives no problem. The message, which follows "row 7 of FILE", says why."""


def row_image(image: object, folder: Path) -> str | bytes:
    """Returns the path or the bytes of an image. Its header is read, but it is not decoded."""
    if isinstance(image, dict):  # the Image feature of the datasets library
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        check_image(BytesIO(image), "its embedded image")
        return image
    if not isinstance(image, str) or not image:
        raise BadValue("has an image that is neither a path nor embedded; correct it")
    path = folder / image
    try:
        missing = not path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        missing = True
    if missing:
        raise BadValue(f"names the image '{image[:200]}', but there is no such file in {folder}; add it")
    check_image(path, f"the image '{image[:200]}'")
    return str(path)


def check_image(file: Path | BytesIO, name: str) -> None:
    """Raises BadValue for bytes that are no image, or for too large an image."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of large images, which the limit below handles
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                pixels = math.prod(image.size)
    except Exception:  # a parser may raise anything on broken bytes
        raise BadValue(f"has {name}, which is no readable image ({', '.join(IMAGE_FORMATS)}); replace it") from None
    if pixels > MAX_PIXELS:
        raise BadValue(f"has {name} of {pixels} pixels, over {MAX_PIXELS}; scale it down")
