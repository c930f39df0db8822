"""Pictures that rows name or hold, looked at before they are used."""

from __future__ import annotations

import math
import warnings
from io import BytesIO
from pathlib import Path

MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class BadValue(Exception):  # noqa: N818  # of one row, and none of the program's errors
    """Why a row gives no problem; the text follows "row 7 of FILE"."""


def row_image(image: object, folder: Path) -> str | bytes:
    """Path or bytes of an image whose header can be read; nothing is decoded."""
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
    """Raises BadValue for bytes that are no picture, or a picture that is too large."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which the limit below is about
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                pixels = math.prod(image.size)
    except Exception:  # a parser may raise anything on broken bytes
        raise BadValue(f"has {name}, which is no readable image ({', '.join(IMAGE_FORMATS)}); replace it") from None
    if pixels > MAX_PIXELS:
        raise BadValue(f"has {name} of {pixels} pixels, over {MAX_PIXELS}; scale it down")
