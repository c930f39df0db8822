"""Makes tests the same on every machine: they run on CPUs unless GPU tests are selected."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

import pytest
import torch

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.vllm.process import check_platform


def hide_gpus(markers: str, environment: MutableMapping[str, str]) -> None:
    """Hides all GPUs from this process and the processes it starts, unless tests marked gpu are selected.

    Args:
        markers: The expression of pytest's option -m.
        environment: The environment of this process, before CUDA starts in it.
    """
    if not re.search(r"(?<!not )\bgpu\b", markers):
        environment["CUDA_VISIBLE_DEVICES"] = ""


def skip_without_vllm_on_a_cpu() -> None:
    """Skips a test that samples with vLLM if vLLM is not installed, or if the installed build samples on GPUs."""
    try:
        check_platform(torch.device("cpu"))
    except SettingError as error:
        pytest.skip(str(error))
