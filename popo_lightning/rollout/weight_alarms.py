"""Alarms for an engine that samples from old weights, because they are sent unchanged or because it ignores them.

Either fault looks like data that age a little too fast, and can go unnoticed for months (verl#7495).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from popo_lightning.core.errors import EngineGapError
from popo_lightning.core.groups import Group
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.engines.base import NamedTensors
from popo_lightning.model.fingerprint import Fingerprint

MAX_IN_A_ROW = 3  # consecutive deliveries without a change after which a run ends

log = logging.getLogger(__name__)


class Delivery:
    """Compares the weights of each sync with those of the previous one, by fingerprints of a part of each weight.

    If training moved the policy but no bit of a delivery changed, it warns at once, and ends the run at the third time
    in a row. Rounding to the engine's dtype may be the cause; even then the engine samples from old weights.

    Attributes:
        digest: Fingerprint of the delivered weights; None before the first delivery, or if the engine did not take all.
    """

    def __init__(self) -> None:
        self.digest: str | None = None
        self._source: str | None = None
        self._in_a_row = 0
        self._taken: Fingerprint | None = None

    @property
    def identity(self) -> str | None:
        """Fingerprint of the engine's weights; None if nothing is known about them."""
        return self.digest or self._source

    def watched(self, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights unchanged and fingerprints them. Some engines take none on some ranks.

        Args:
            weights: Weights for the engine, by name.
        """
        self._taken, found = None, Fingerprint(whole=False)
        yield from found.of_each(weights)
        self._taken = found

    def judge(self, source: str | None) -> None:
        """Compares a complete delivery with the previous one. A collective.

        Args:
            source: Fingerprint of the trained weights that were delivered; None if unknown.

        Raises:
            EngineGapError: Several deliveries in a row changed nothing.
        """
        digest = None if self._taken is None else self._taken.hexdigest()
        self._taken = None
        moved = None not in (source, self._source) and source != self._source
        same = any(all_gather_object(moved and digest is not None and digest == self.digest))
        if moved:
            self._in_a_row = self._in_a_row + 1 if same else 0
        self.digest, self._source = digest, source
        if same:
            _say(
                self._in_a_row,
                "the weights sent to the engine have not changed by a bit, though optimizer steps moved the policy",
                "the engine samples from an older one; raise the learning rate (model.optimizer) if steps are smaller "
                "than the rounding of trainer.precision, and report this otherwise",
            )


class Probe:
    """Repeats the same questions with the same seed after a sync: equal bits mean that the engine ignored new weights.

    It asks after the first sync, and then after each sync that changed the weights, until an answer differs by a bit.

    Args:
        ask: Samples groups of a few responses to the same problems, without a trace in the run.
    """

    def __init__(self, ask: Callable[[], Sequence[Group]]) -> None:
        self.ask = ask
        self.done = False
        self._first: tuple[str | None, list[torch.Tensor]] | None = None
        self._in_a_row = 0

    def after(self, identity: str | None) -> None:
        """Asks the engine if its weights are new. A collective.

        Args:
            identity: Fingerprint of the weights that the engine was given.

        Raises:
            EngineGapError: Answers did not change, several times in a row.
        """
        if self.done:
            return
        new = self._first is None or (identity is not None and identity != self._first[0])
        if not any(all_gather_object(new)):
            return
        answers = [response.behave_logp for group in self.ask() for response in group.responses]
        if self._first is None:
            self._first = identity, answers
            return
        same = new and all(torch.equal(one, other) for one, other in zip(self._first[1], answers, strict=True))
        if not any(all_gather_object(same)):
            self.done, self._first = True, None
            return
        self._in_a_row += 1
        _say(
            self._in_a_row,
            "the engine has been given other weights, but its log-probs are those of the first policy, bit for bit",
            "it does not take the weights; choose another data.engine or model, and report this",
        )


def _say(times: int, finding: str, remedy: str) -> None:
    if times >= MAX_IN_A_ROW:
        raise EngineGapError(f"{finding}, {times} syncs in a row: {remedy}")
    log.warning("%s: %s (the run ends at the %drd in a row)", finding, remedy, MAX_IN_A_ROW)
