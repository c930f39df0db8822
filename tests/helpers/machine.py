"""The same tests on every machine: on CPUs, unless those for a GPU are asked for."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

import pytest
import torch

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.vllm.process import check_platform


def hide_gpus(markers: str, environment: MutableMapping[str, str]) -> None:
    """Hides all GPUs from this process and those it starts, unless its tests are the ones marked gpu.

    Args:
        markers: Expression of pytest's option -m.
        environment: Of this process, before CUDA starts in it.
    """
    if not re.search(r"(?<!not )\bgpu\b", markers):
        environment["CUDA_VISIBLE_DEVICES"] = ""


def skip_without_vllm_on_a_cpu() -> None:
    """Skips a test that samples with vLLM where none is installed, or one that samples on GPUs."""
    try:
        check_platform(torch.device("cpu"))
    except SettingError as error:
        pytest.skip(str(error))
