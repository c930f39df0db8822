"""Reads numbers of other libraries without importing them."""

from __future__ import annotations

from typing import Any


def plain_scalar(value: Any) -> Any:
    """The number in a scalar of numpy or torch; anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
