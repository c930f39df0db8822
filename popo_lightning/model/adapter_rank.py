"""The rank of adapters beside the matrices: above a matrix's smaller side it adds parameters that change nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from popo_lightning.core.errors import SettingError

log = logging.getLogger(__name__)


def check_rank(model: Any, targets: Sequence[str], r: int) -> None:
    """Raises SettingError for a rank above the smaller side of every matrix that gets an adapter.

    Args:
        model: A transformers model, which may be on the meta device.
        targets: Full names of the layers.
        r: Rank of the adapters.
    """
    full = _full_ranks(model, targets)
    if full and r > max(full):
        raise SettingError(
            f"model.lora.r is {r}, but no matrix with an adapter has a rank above {max(full)}, its smaller side; use "
            f"at most {max(full)}, such as {min(16, max(full))}"
        )


@rank_zero_only
def warn_of_rank(model: Any, targets: Sequence[str], r: int) -> None:
    """Warns once of a rank above the smaller side of some matrices.

    Args:
        model: Same as for :func:`check_rank`.
        targets: Same as for :func:`check_rank`.
        r: Same as for :func:`check_rank`.
    """
    full = _full_ranks(model, targets)
    small = sum(r > each for each in full)
    if small:
        log.warning(
            "model.lora.r is %d, but %d of the %d matrices with an adapter have a smaller side, the smallest %d; there "
            "a higher rank costs memory and adds nothing",
            r,
            small,
            len(full),
            min(full),
        )


def _full_ranks(model: Any, targets: Sequence[str]) -> list[int]:
    named = dict(model.named_modules())
    return [min(named[name].weight.shape) for name in targets]
