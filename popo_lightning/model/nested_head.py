"""A critic with a shared part and a part for each group of problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from popo_lightning.core.bounds import at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.critic_heads import ScalarHead, ValueHead


class NestedHead(ScalarHead):
    """V = V_shared + V_delta[group], for problems of different kinds (NFQI, 2110.02879; ArpiS/nested-policy-rl).

    The shared part learns from all problems. Each named group also has its own linear head, which starts at 0 and is
    pulled to 0. A problem of no named group has only the shared value. With `shared_iterations` there are two stages,
    as in the source: only the shared part learns, then only the groups' parts.

    For comparison, a group-relative method such as GRPO has the mean of one problem's responses as its baseline, which
    knows more than the problem's group.

    Deviations: the source ends the first stage by evaluations of a policy, and its second part is a separate network;
    here it is a linear head on the shared states.

    Args:
        field: Field of a problem's info that names its group, such as level.
        groups: Values of the field that have their own part, as text.
        penalty: Coefficient of the pull to 0. Half of this times the squared weights of the groups' parts is added to
            the critic's loss.
        shared_iterations: Number of iterations of the first stage; null trains both parts from the start.
    """

    def __init__(
        self, field: str, groups: Sequence[str], penalty: float = 0.01, shared_iterations: int | None = None
    ) -> None:
        self.field = field
        self.groups = tuple(str(each) for each in groups)
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise SettingError(f"NestedHead.groups is {list(groups)}; name one group or more, each once")
        self.penalty = at_least("NestedHead.penalty", penalty, 0, ", such as 0.01")
        self.shared_iterations = shared_iterations
        if shared_iterations is not None:
            at_least("NestedHead.shared_iterations", shared_iterations, 1, ", or null for one stage")

    def group_of(self, info: Mapping[str, Any]) -> int:
        """Returns the index of a problem's group in :attr:`groups`; -1 for none of them."""
        if self.field not in info:
            known = ", ".join(sorted(info)) or "none at all"
            raise SettingError(
                f"model.critic.head.field is '{self.field}', which a problem of the task does not have; its fields are "
                f"{known}"
            )
        own = str(info[self.field])
        return self.groups.index(own) if own in self.groups else -1

    @torch.no_grad()
    def shape_gradients(self, value_model: nn.Module, iteration: int) -> None:
        """Adds the penalty's gradient, and drops the gradients of the part that the present stage does not train.

        In the first stage, the groups' gradients become 0 instead of None, so that the optimizer has state for all
        parts when a checkpoint is written. The groups' weights stay 0.

        Args:
            value_model: Value model with the groups' heads as `delta`.
            iteration: Iteration of the step, counted from 0.
        """
        for name, each in value_model.named_parameters():
            if each.grad is None:
                continue
            of_groups = name.startswith("delta.")
            if self.shared_iterations is not None and of_groups == (iteration < self.shared_iterations):
                each.grad = each.grad.zero_() if of_groups else None
            elif of_groups:
                each.grad.add_(each, alpha=self.penalty)


def problem_groups(minibatch: Minibatch, head: ValueHead) -> dict[str, list[Tensor]]:
    """Returns the index of each row's problem group, for a head with such groups; otherwise nothing.

    Args:
        minibatch: Minibatch with the rows.
        head: Head of the critic.

    Returns:
        "problem_group", one scalar per row; empty for a head without groups.
    """
    if not head.groups:
        return {}
    found = [head.group_of(group.problem.info) for group in minibatch.groups for _ in group.responses]
    return {"problem_group": [torch.tensor(float(place)) for place in found]}


def chosen(of_groups: Tensor, group: Tensor) -> Tensor:
    """Selects each token's output of its own group; 0 for tokens without a group.

    Args:
        of_groups: (N, G) outputs of all groups.
        group: (N,) indices of the tokens' groups, -1 for none.
    """
    return torch.where(group < 0, 0.0, of_groups.gather(1, group.clamp(min=0)[:, None])[:, 0])
