"""Dynamic sampling: samples in chunks until the batch is full of effective groups (DAPO 2503.14476)."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from typing import Literal

from popo_lightning.core.bounds import above, at_least, one_of
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.replay.composer import Composer, Iteration

log = logging.getLogger(__name__)


class ChunkSize(ABC):
    """Slot of dynamic sampling: how many further problems to ask while the batch is not full."""

    @abstractmethod
    def __call__(self, missing: int, asked: int, ineffective: int, problems: int) -> int:
        """Returns the number of problems of the next engine call.

        Args:
            missing: Number of effective groups still wanted.
            asked: Number of problems asked so far in this iteration.
            ineffective: Number of ineffective groups so far in this iteration.
            problems: Number of problems of a usual iteration.
        """


class FixedChunk(ChunkSize):
    """Always asks the same number of problems.

    Args:
        share: Chunk size as a fraction of an iteration's problems. 1.0 asks whole batches, as verl does by default.
    """

    def __init__(self, share: float = 0.25) -> None:
        self.share = above("data.composer.chunk.share", share, 0, "0.25 of the usual problems")

    def __call__(self, missing: int, asked: int, ineffective: int, problems: int) -> int:
        """Returns `share` of the usual number."""
        return math.ceil(self.share * problems)


class AdaptiveChunk(ChunkSize):
    """Asks as many problems as should fill the batch: factor x missing / (1 - observed ineffective share).

    GRESO's adaptive batch (2506.02177; Infini-AI-Lab/GRESO, ray_trainer) has factor 1.25 and bounds of 64 and 384
    problems at a batch of 256, which are fractions of 0.25 and 1.5. GRESO observes the share in its last call; this
    rule observes it in all calls of the iteration, which varies less for small chunks.

    Args:
        factor: Safety factor. Above 1 needs fewer calls and leaves more surplus; at 1 about every second call fills the
            batch.
        min_share: Minimum chunk size as a fraction of an iteration's problems.
        max_share: Maximum chunk size as a fraction of an iteration's problems; also the chunk size until a group is
            effective.
    """

    def __init__(self, factor: float = 1.25, min_share: float = 0.25, max_share: float = 1.5) -> None:
        self.factor = above("data.composer.chunk.factor", factor, 0, "1.25")
        self.min_share = above("data.composer.chunk.min_share", min_share, 0, "0.25 of the usual problems")
        self.max_share = at_least("data.composer.chunk.max_share", max_share, min_share, " (chunk.min_share)")

    def __call__(self, missing: int, asked: int, ineffective: int, problems: int) -> int:
        """Returns the missing groups divided by the observed effective share, times the factor, within bounds."""
        min_share, max_share = math.ceil(self.min_share * problems), math.ceil(self.max_share * problems)
        effective = asked - ineffective
        wanted = math.ceil(self.factor * missing * asked / effective) if effective else max_share
        return min(max_share, max(min_share, wanted))


class DynamicSampling(Composer):
    """DAPO's dynamic sampling: asks problems until a full batch of groups is effective.

    Source: DAPO (2503.14476, dynamic sampling; verl recipe/dapo), and GRESO's adaptive generation batch (2506.02177) as
    a chunk size.

    Formula: ask as many problems as groups are wanted, keep the effective groups, and ask another chunk while some are
    missing. The batch is the first effective groups in the order asked, so it does not depend on which finished first.

    Surplus: a last chunk usually gives more than was missing. `discard` is DAPO as published: surplus groups are
    discarded although they were paid for. `carry` trains on them first in the next iteration, which asks that many
    problems fewer. Carried groups are one policy version old (older only where one chunk gave more than a batch), count
    as replayed, and get the behavior weight. With small chunks and `carry`, an iteration costs about problems / f
    responses' worth at an effective share f. Whole chunks (FixedChunk 1.0) and `discard` pay for the last batch in
    full.

    Stored: carried groups. Extra passes: none for fresh groups; carried ones have their prox log-probs computed like
    any other row. All sampled responses count in total/responses.

    Deviations: each rank fills its own share of the batch and waits for the slowest rank, where verl fills one batch
    for all ranks. The default carries the surplus and asks in chunks, for a comparison at equal use of responses.

    Args:
        chunk: Size of every call after the first.
        surplus: What happens to surplus groups: carry or discard.
        first: Size of the first call as a multiple of the groups wanted. GRESO asks 1.5.
        max_batches: Maximum number of problems asked per iteration, in batches of an iteration's problems (verl's
            max_num_gen_batches).
        at_cap: What happens at max_batches. "short" trains on the effective groups there are. "ineffective" adds
            ineffective ones, which have no gradient but count in the loss denominator. "repeat" trains on effective
            ones more than once (MoPPS' recipe). "error" stops the run (verl).
    """

    state = ("_carried",)

    def __init__(
        self,
        chunk: ChunkSize = AdaptiveChunk(),  # noqa: B008  # holds settings only
        surplus: Literal["carry", "discard"] = "carry",
        first: float = 1.0,
        max_batches: float = 10.0,
        at_cap: Literal["short", "ineffective", "repeat", "error"] = "short",
    ) -> None:
        self.chunk = chunk
        self.surplus = one_of("data.composer.surplus", surplus, ("carry", "discard"))
        self.first = above("data.composer.first", first, 0, "1.0")
        self.max_batches = at_least("data.composer.max_batches", max_batches, 1, ", the usual problems")
        self.at_cap = one_of("data.composer.at_cap", at_cap, ("short", "ineffective", "repeat", "error"))
        self._carried: list[Group] = []

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns as many effective groups as an iteration has problems; carried ones come first."""
        wanted, max_share = iteration.num_problems, math.floor(self.max_batches * iteration.num_problems)
        effective, ineffective, asked = list(filter(iteration.still_effective, self._carried)), list[Group](), 0
        while (missing := wanted - len(effective)) > 0 and asked < max_share:
            count = self.chunk(missing, asked, len(ineffective), wanted) if asked else math.ceil(self.first * missing)
            count = min(count, max_share - asked)
            found, dull = iteration.split(iteration.rollout(count))
            effective += found
            ineffective += dull
            asked += count
        self._carried = effective[wanted:] if self.surplus == "carry" else []
        batch = effective[:wanted]
        return batch if len(batch) == wanted else self._at_cap(batch, ineffective, wanted, asked)

    def _at_cap(self, batch: list[Group], ineffective: list[Group], wanted: int, asked: int) -> list[Group]:
        found = f"{len(batch)} of {wanted} effective groups after {asked} problems"
        if self.at_cap == "error":
            raise SettingError(
                f"data.composer.max_batches is {self.max_batches}, but there were only {found}; raise it, ask easier "
                "or harder problems, or set data.composer.at_cap to short"
            )
        log.warning("dynamic sampling stops at its cap: %s (data.composer.max_batches %s)", found, self.max_batches)
        missing = wanted - len(batch)
        if self.at_cap == "ineffective":
            return batch + ineffective[:missing]
        if self.at_cap == "repeat" and batch:
            return batch + [batch[place % len(batch)] for place in range(missing)]
        return batch
