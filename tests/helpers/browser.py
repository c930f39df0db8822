"""Gives tests the browser of scripts/browser.py. They are skipped if there is no Chromium."""

from __future__ import annotations

import sys

import pytest

from helpers.tiny_models import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
from browser import CHROMIUM, Page

__all__ = ["Page", "needs_browser"]

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian's package chromium)")
