"""GRAFT: a peer model's groups replace groups of the same problems that have no correct response."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from popo_lightning.core.bounds import within
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.objectives.advantages import group_normalized
from popo_lightning.objectives.inputs import LOG_RATIO_BOUND
from popo_lightning.replay.composer import Composer, Iteration
from popo_lightning.replay.recorded_groups import recorded_groups

log = logging.getLogger(__name__)


def compatibility(logp: Tensor, peer_logp: Tensor) -> float:
    """Returns the geometric mean of pi_policy / pi_peer over a response's tokens; 1 means equally likely under both.

    Args:
        logp: (T,) log-probs under the policy.
        peer_logp: (T,) log-probs under the peer that sampled the response.
    """
    logs = (logp - peer_logp).double().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return math.exp(float(logs.mean()))


@dataclass(eq=False)
class GRAFT(Composer):
    """GRAFT: replaces a group without a success by a peer model's group of its problem, if that fits the policy.

    A peer group's advantages are (R - mean) / (std + 1e-6) over all its responses, as the peer would have learned from
    it. Then responses with a `compatibility` below min_ratio are left out; a group with no response left is not
    grafted. The remaining responses answer the fresh group's prompt, have the peer's log-probs as behave, and come in
    an epoch's last minibatches. The trust region supplies the token-level clip: use BehaveAligned with behavior weight
    NoCorrection, or PPOClip with TruncatedIS. Failed groups without a peer group stay and teach nothing. Extra
    rollouts: none. Extra passes: one forward pass over the peer groups that are considered. Stored: the files' groups,
    in memory. A checkpoint does not contain them, so a resumed run needs the same files.

    Inferred: only a description of the paper could be read. It names the parts: groups without a success, a peer's
    groups, advantages of the source, a gate for sequences, a clip for tokens, peer minibatches last. The formulas of
    gate and advantage, and every threshold, are choices made here.

    Args:
        peers: Files of the peer's groups, as RecordGroups writes them; null for none, which is GRPO. Peer and policy
            need the same tokenizer and the same prompts.
        min_ratio: Minimum compatibility of a peer's response, from 0 (keeps all) to 1.
        reward_key: Reward component of the advantages; use the one that is trained on.
        success_key: Reward component that measures success.
        success_above: A response is a success if that component is greater than this.
    """

    transient = ("_peers", "_grafted", "_left_out")
    fixes_advantages = True
    follows_reward = True
    trains_on_others = True

    peers: list[str] | None = None
    min_ratio: float = 0.5
    reward_key: str = "score"
    success_key: str = "acc"
    success_above: float = 0.5

    def __post_init__(self) -> None:
        within("GRAFT.min_ratio", self.min_ratio, 0, 1, "0.5")
        self._peers = self._of_use(recorded_groups(self.peers or [], "GRAFT.peers"))
        if self.peers and not self._peers:
            raise SettingError(
                f"GRAFT.peers is {self.peers}, without a group that has a right response ('{self.success_key}' above "
                f"{self.success_above:g}) and differs in '{self.reward_key}', from which a policy could learn; name "
                "files of another peer"
            )
        self._grafted: list[Group] = []  # groups grafted in the last iteration
        self._left_out = 0  # peer responses that were too long or incompatible in the last iteration

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns the fresh groups that are not replaced, then the grafted groups."""
        fresh = iteration.rollout()
        if not self._peers and not iteration.version:
            log.warning("GRAFT has no groups of a peer (data.composer.peers), so this run is one of GRPO")
        self._left_out = 0
        found = {place: peer for place, each in enumerate(fresh) if (peer := self._peer(each, place, iteration))}
        grafted: dict[int, Group] = {}
        for (place, peer), present in zip(found.items(), iteration.logprobs(list(found.values())), strict=True):
            ratios = [compatibility(logp, one.behave_logp) for logp, one in zip(present, peer.responses, strict=True)]
            if (group := self._kept(peer, [ratio >= self.min_ratio for ratio in ratios])) is not None:
                grafted[place] = group
        self._grafted = list(grafted.values())
        return [each for place, each in enumerate(fresh) if place not in grafted] + self._grafted

    def _peer(self, fresh: Group, place: int, iteration: Iteration) -> Group | None:
        """Returns a peer's group for a failed fresh group, with its problem, the version before it, and advantages.

        Responses longer than this run allows are left out before scoring.
        """
        peers = self._peers.get(fresh.problem.id, [])
        if not peers or self._succeeds(fresh):
            return None
        peer = iteration.random("GRAFT", place).choice(peers)
        if not torch.equal(peer.prompt_ids, fresh.prompt_ids):
            raise SettingError(
                f"GRAFT.peers has other prompt tokens for problem '{fresh.problem.id}' than this run; record groups of "
                "a peer with this run's task, template and tokenizer"
            )
        if (largest := max(int(one.token_ids.max()) for one in peer.responses)) >= iteration.vocab_size:
            raise SettingError(
                f"GRAFT.peers has token {largest} in a response to problem '{fresh.problem.id}', but the policy knows "
                f"{iteration.vocab_size} tokens; record groups of a peer with the same tokenizer"
            )
        advantages = group_normalized(peer.rewards(self.reward_key)[None])[0]
        before = iteration.version - 1
        peer = replace(peer, problem=fresh.problem, images=fresh.images, version=before, advantages=advantages)
        return self._kept(peer, [len(one.token_ids) <= iteration.max_new_tokens for one in peer.responses])

    def _kept(self, peer: Group, keep: Sequence[bool]) -> Group | None:
        """Returns a peer's group with some of its responses and their advantages, or None if none are kept."""
        indices = [index for index, kept in enumerate(keep) if kept]
        self._left_out += len(keep) - len(indices)
        if not indices:
            return None
        assert peer.advantages is not None
        return replace(peer, responses=[peer.responses[i] for i in indices], advantages=peer.advantages[indices])

    def _succeeds(self, group: Group) -> bool:
        return bool((group.rewards(self.success_key) > self.success_above).any())

    def _of_use(self, groups: dict[str, list[Group]]) -> dict[str, list[Group]]:
        """Returns the groups with a correct response and different rewards; problems without any are dropped."""
        found = {
            problem: [group for group in of if group.is_effective(self.reward_key) and self._succeeds(group)]
            for problem, of in groups.items()
        }
        return {problem: of for problem, of in found.items() if of}

    def trained_last(self) -> Collection[int]:
        """Returns the ids of the grafted groups."""
        return {group.id for group in self._grafted}

    def report(self) -> dict[str, float]:
        """Returns the number of groups grafted and of peer responses left out in the last iteration."""
        return {
            "replay/grafted_groups": float(len(self._grafted)),
            "replay/left_out_responses": float(self._left_out),
        }
