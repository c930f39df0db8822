"""SeRA (arXiv 2410.09362): pairs chosen, and made, by the policy's own implicit reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from popo_lightning.core.bounds import at_least, one_of, within
from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer, redistribute
from popo_lightning.replay.composer import Iteration
from popo_lightning.replay.pairs import ReplayedPairs, as_pair

Kept = Literal["largest", "smallest", "middle"]


def chosen_by_margin(margins: Sequence[float], share: float, kept: Kept, random: Random) -> list[int]:
    """Returns the indices of the margins that are kept, in ascending order.

    Args:
        margins: Margin of each pair.
        share: Fraction of the pairs to keep; at least one pair is kept.
        kept: Which margins to keep.
        random: Decides between equal margins.
    """
    order = list(range(len(margins)))
    random.shuffle(order)
    order.sort(key=margins.__getitem__)  # stable, so equal margins stay shuffled
    count = min(len(order), max(1, round(share * len(order))))
    first = {"smallest": 0, "middle": (len(order) - count) // 2, "largest": len(order) - count}[kept]
    return sorted(order[first : first + count])


def summed(logps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns, for each group, the (K,) float64 sums over its responses' tokens."""
    return [torch.stack([logp.double().sum() for logp in of_group]) for of_group in logps]


class SeRA(ReplayedPairs):
    """Self-reviewing and alignment: pairs by the margin of the implicit reward (arXiv 2410.09362).

    The implicit reward of a response is D = sum over its tokens of log(pi_present / pi_first), up to the factor beta,
    and the margin of a pair is D+ - D-. A constant added to D of all responses to a prompt changes nothing. A fraction
    of the pairs of fresh and stored effective groups is kept: by default those with the largest margins, on which
    policy and label agree most.

    With `bootstrap` above 0 pairs also come from ineffective groups, where the verifier cannot tell responses apart.
    Such a group waits for one iteration. D is averaged over the policies before and after it. The responses with the
    largest and the smallest mean make a pair if the means differ by more than `min_margin`.

    Stored: the buffer, and with bootstrap the ineffective groups of one iteration. Extra passes: present and first
    policy over all candidates (none with margin_share 1), and with bootstrap over the ineffective groups, the present
    one twice. The first policy occupies memory beside the trained one.

    Deviations: the source also averages the margins of candidates over two iterates; here they are those of the present
    policy. The source samples new responses for pairs; here pairs are made of the iteration's own responses. Its
    fractions could not be read, so the defaults are choices made here. A sum over tokens grows with their number, so
    long responses have large margins; what the source does about that is unknown.

    Args:
        buffer: Replay buffer of effective groups.
        pairs_per_group: Maximum number of pairs per group. No two of its pairs share a response.
        margin_share: Fraction of the candidate pairs that are kept; 1 keeps all and computes no margins.
        kept: Which pairs are kept: those with the largest margins, the smallest, or the middle ones.
        bootstrap: Loss weight of pairs made by the implicit reward alone; 0 makes none.
        min_margin: Margin in nats that a pair made by `bootstrap` must exceed.
    """

    state = ("_waiting",)
    transient = ("_numbers",)

    def __init__(
        self,
        buffer: GroupReplayBuffer,
        pairs_per_group: int = 1,
        margin_share: float = 0.5,
        kept: Kept = "largest",
        bootstrap: float = 0.0,
        min_margin: float = 1.0,
    ) -> None:
        super().__init__(buffer, pairs_per_group)
        self.margin_share = within("SeRA.margin_share", margin_share, 0, 1, "0.5")
        self.kept = one_of("SeRA.kept", kept, get_args(Kept))
        self.bootstrap = at_least("SeRA.bootstrap", bootstrap, 0, "; 0 makes no pairs of ineffective groups")
        self.min_margin = at_least("SeRA.min_margin", min_margin, 0, ", such as 1.0")
        self.needs_reference = margin_share < 1 or bootstrap > 0
        # Ineffective groups of the last iteration, with (K,) first-policy log-probs and the implicit rewards of then.
        self._waiting: list[tuple[Group, Tensor, Tensor]] = []
        self._numbers: dict[str, float] = {}

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the pairs that are kept, then those made by the implicit reward alone."""
        groups, ineffective = self.groups(iteration)
        self._numbers = {}
        found = self._selected(iteration, self.pairs(iteration, groups))
        made = self._bootstrapped(iteration, ineffective) if self.bootstrap else []
        self._numbers["pairs/bootstrapped_share"] = len(made) / max(1, len(found) + len(made))
        return found + made

    def _selected(self, iteration: Iteration, pairs: list[Group]) -> list[Group]:
        if self.margin_share == 1 or not pairs:
            return pairs
        present, first = iteration.logprobs(pairs), iteration.reference_logprobs(pairs)
        rewards = [now - start for now, start in zip(summed(present), summed(first), strict=True)]
        margins = [float(better - worse) for better, worse in rewards]
        chosen = chosen_by_margin(margins, self.margin_share, self.kept, iteration.random("SeRA"))
        agreeing = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
        self._numbers |= {
            "pairs/margin": math.fsum(margins) / len(margins),
            "pairs/kept_margin": math.fsum(margins[index] for index in chosen) / len(chosen),
            "pairs/accuracy": agreeing / len(margins),
        }
        return [pairs[index] for index in chosen]

    def _bootstrapped(self, iteration: Iteration, ineffective: Sequence[Group]) -> list[Group]:
        """Makes pairs of the groups that have waited, and lets this iteration's ineffective groups wait."""
        waiting, groups = self._waiting, [group for group, _, _ in self._waiting]
        made = []
        for (group, first, before), present in zip(waiting, summed(iteration.logprobs(groups)), strict=True):
            reward = (before + present - first) / 2
            if float(reward.max() - reward.min()) > self.min_margin:
                made.append(as_pair(group, int(reward.argmax()), int(reward.argmin()), self.bootstrap))
        presents, firsts = iteration.logprobs(ineffective), iteration.reference_logprobs(ineffective)
        self._waiting = [
            (group, first, present - first)
            for group, present, first in zip(ineffective, summed(presents), summed(firsts), strict=True)
        ]
        return made

    def report(self) -> dict[str, float]:
        """Returns the last iteration's margins and accuracy, and the share of pairs made by the implicit reward."""
        return self._numbers

    def reshard(self, states: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        """Redistributes all stored and waiting groups over the ranks."""
        waiting = redistribute([state["_waiting"] for state in states], ranks)
        return [
            of_buffer | {"_waiting": own}
            for of_buffer, own in zip(super().reshard(states, ranks), waiting, strict=True)
        ]
