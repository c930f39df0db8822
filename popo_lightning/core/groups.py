"""Responses and groups: what the engine returns, the verifier grades, the buffer keeps and the policy trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from popo_lightning.core.problems import Problem, SavedWhole

# Rewards closer than this count as equal. A test by std > 0 fails: several equal 0.1's have a std of 1e-17.
REWARD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Response(SavedWhole):
    """One sampled completion.

    Args:
        token_ids: (T,) int64, including the end-of-sequence token if the policy sampled it.
        behave_logp: (T,) float32 log-probs under the policy that sampled, as the engine recorded them or, by
            data.behave, as the trainer computes them.
        finish_reason: "stop" (the policy ended it) or "length" (cut at the token limit).
        text: Text decoded without special tokens; the verifier reads it.
        parts: Reward components by name; always includes "score" and "acc" once graded.
        failure: Why grading failed, or None.
        version: Policy version that sampled it, if a rule has put it into another version's group; otherwise None.
        temperature: Sampling temperature, if each response has its own; otherwise None.
        penalty: Penalty that limits charge (docs/limits.md), in the unit of advantages.
    """

    token_ids: Tensor
    behave_logp: Tensor
    finish_reason: str
    text: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    version: int | None = None
    temperature: float | None = None
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.behave_logp.shape or self.token_ids.dim() != 1:
            raise ValueError(
                f"a response needs one behavior log-prob per token, got shapes {tuple(self.token_ids.shape)} "
                f"and {tuple(self.behave_logp.shape)}"
            )


@dataclass(frozen=True)
class Group(SavedWhole):
    """The K responses of one prompt, sampled by one policy version.

    Args:
        id: Unique in the run.
        problem: The problem that was asked.
        prompt_ids: (P,) int64, exactly the tokens the engine received.
        responses: K graded responses.
        version: Policy version that sampled all of them.
        images: The vision tower's inputs for the prompt's images; empty for text. They are kept so that a replayed
            group needs neither its files nor a processor.
        prefix_tokens: Number of last prompt tokens that are the beginning of an earlier response, from which these
            responses restart.
        advantages: (K,) advantages fixed by a composer; None leaves them to the advantage slot.
        loss_weight: Multiplies the loss of the group's responses.
        subtree_rewards: (N,) rewards of other responses that restart inside this group's, for tree baselines.
        critic_only: Whether a critic alone learns from the group; the policy's loss and its metrics leave it out.
    """

    id: int
    problem: Problem
    prompt_ids: Tensor
    responses: list[Response]
    version: int
    images: dict[str, Tensor] = field(default_factory=dict)
    prefix_tokens: int = 0
    advantages: Tensor | None = None
    loss_weight: float = 1.0
    subtree_rewards: Tensor | None = None
    critic_only: bool = False

    def version_of(self, response: Response) -> int:
        """Policy version that sampled one of the responses."""
        return self.version if response.version is None else response.version

    def rewards(self, key: str = "score") -> Tensor:
        """(K,) float32 rewards by one component; 0 for a response whose grading failed."""
        return torch.tensor([response.parts.get(key, 0.0) for response in self.responses], dtype=torch.float32)

    def penalties(self) -> Tensor:
        """(K,) float32 penalties that limits charge; 0 without limits."""
        return torch.tensor([response.penalty for response in self.responses], dtype=torch.float32)

    def combined(self, key: str = "score") -> Tensor:
        """(K,) float32 rewards by one component minus the penalties."""
        return self.rewards(key) - self.penalties()

    def is_effective(self, key: str = "score") -> bool:
        """Whether the combined rewards differ, so that the group carries a gradient (2606.01281, section 1)."""
        rewards = self.combined(key)
        return bool(rewards.max() - rewards.min() > REWARD_TOLERANCE)

    @property
    def tokens(self) -> int:
        """Response tokens of the group."""
        return sum(len(response.token_ids) for response in self.responses)


# Checkpoints hold these objects and are read with weights_only=True.
torch.serialization.add_safe_globals([Problem, Response, Group])
