"""Limits on mean costs of responses, with multipliers that learn, by an augmented Lagrangian.

The rule is CAL's (Constrained RL by augmented Lagrangian, openreview vy42bYs1Wo, ICLR 2024; ZifanWu/CAL), for groups of
responses. For a cost C with bound d, in units u,

    C_ucb = mean + k * standard error,        over the groups that an iteration sampled,
    multiplier = max(0, lambda + c * (C_ucb - d) / u),
    log lambda <- Adam ascent on lambda * (C_ucb - d) / u,
    A = A(reward) - sum over limits of multiplier * (cost - mean cost of the group) / u.

Deviations: the source takes the confidence bound over an ensemble of critics; here sampled costs are averaged. The
source takes millions of Adam steps, a run here hundreds. So lambda stays above a floor, and Adam forgets after 100
steps instead of 1000. Cost advantages are not divided by the group's standard deviation, or the multiplier would have
no unit.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.metric_names import RULE, is_part
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.ranks import all_gather_object
from popo_lightning.model.policy_model import PolicyModel
from popo_lightning.rollout.limit_settings import ERROR, KL, KNOWN, Limit, NamedLimit

MIN_LAMBDA = 0.01  # floor: Adam would move log lambda down without bound, and lambda would take long to return
BETAS = (0.9, 0.99)  # Adam takes one step per iteration and remembers 100 iterations


class Multiplier:
    """The multiplier of one limit.

    Args:
        limit: Limit that the multiplier enforces.

    Attributes:
        value: Mean cost over the groups of the last iteration that sampled any; NaN before the first.
        price: The multiplier, which is the charge for one unit of cost; 0 before the first measurement.
    """

    def __init__(self, limit: NamedLimit) -> None:
        self.limit = limit
        self.value = math.nan
        self.price = 0.0
        self._log_lambda = torch.tensor(math.log(limit.start), dtype=torch.float64, requires_grad=True)
        self._adam = torch.optim.Adam([self._log_lambda], lr=limit.lr, betas=BETAS, maximize=True, foreach=False)
        self._lambda = limit.start

    def measured(self, costs: Sequence[float]) -> None:
        """Learns from an iteration. Sums are exact, so the order of the ranks' groups does not matter.

        Args:
            costs: Mean cost of each group of all ranks; an empty list changes nothing.
        """
        if not costs:
            return
        limit, groups = self.limit, len(costs)
        self.value = math.fsum(costs) / groups
        error = math.sqrt(math.fsum((cost - self.value) ** 2 for cost in costs) / max(1, groups - 1) / groups)
        excess = (self.value + limit.k * error - limit.bound) / limit.unit
        self._lambda = math.exp(self._log_lambda.item())
        self.price = max(0.0, self._lambda + limit.c * excess)
        self._log_lambda.grad = torch.tensor(self._lambda * excess, dtype=torch.float64)
        self._adam.step()
        with torch.no_grad():
            self._log_lambda.clamp_(min=math.log(min(MIN_LAMBDA, limit.start)))

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of the last iteration that sampled any groups; empty before it."""
        if math.isnan(self.value):
            return {}
        return {
            "value": self.value,
            "bound": self.limit.bound,
            "lambda": self._lambda,
            "multiplier": self.price,
            "violated": float(self.value > self.limit.bound),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that decides later multipliers."""
        own = {"value": self.value, "price": self.price, "lambda": self._lambda, "log_lambda": self._log_lambda.item()}
        return own | {"adam": copy.deepcopy(self._adam.state_dict())}  # its tensors change in place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, but the learning rate is that of the present settings."""
        self.value, self.price, self._lambda = state["value"], state["price"], state["lambda"]
        with torch.no_grad():
            self._log_lambda.fill_(state["log_lambda"])
        self._adam.load_state_dict(copy.deepcopy(state["adam"]))
        self._adam.param_groups[0]["lr"] = self.limit.lr


class Limits:
    """The limits of a run, with one multiplier each, equal on all ranks.

    Args:
        limits: Limits by name; a number is a limit's bound. None or an empty mapping changes nothing.
        max_new_tokens: Maximum tokens of a response (data.max_new_tokens).
    """

    def __init__(self, limits: Mapping[str, Limit | float] | None = None, max_new_tokens: int = 1) -> None:
        given = {name: one if isinstance(one, Limit) else Limit(one) for name, one in (limits or {}).items()}
        check_names(given)
        self.multipliers = {name: Multiplier(limit.named(name, max_new_tokens)) for name, limit in given.items()}

    def __len__(self) -> int:
        return len(self.multipliers)

    @property
    def need_reference(self) -> bool:
        """Whether a limit bounds the divergence from the policy that the run began with."""
        return any(each.limit.cost == KL for each in self.multipliers.values())

    @property
    def bound_components(self) -> bool:
        """Whether a limit bounds a reward component, and not only lengths or the divergence."""
        return any(each.limit.cost not in KNOWN for each in self.multipliers.values())

    def check_components(self, graded: Collection[str]) -> None:
        """Raises SettingError for a limit on a reward component that responses do not have.

        Args:
            graded: Reward components of a graded response.
        """
        for name, each in self.multipliers.items():
            cost = each.limit.cost
            if cost not in KNOWN and each.limit.component(graded) not in graded:
                known = [*KNOWN, *sorted(graded), *(f"{name}{ERROR}" for name in sorted(graded))]
                hint = did_you_mean(cost, known, f"use one of {', '.join(known)}")
                raise SettingError(f"the cost of data.limits.{name} is '{cost}', which the task does not give; {hint}")

    def priced(self, groups: Sequence[Group]) -> list[Group]:
        """Sets the penalty of each response to its charge at the present multipliers.

        Args:
            groups: Fresh groups, or stored ones, whose penalty is that of an earlier iteration.
        """
        if not self.multipliers:
            return list(groups)
        return [replace(g, responses=[replace(r, penalty=self._penalty(g, r)) for r in g.responses]) for g in groups]

    def _penalty(self, group: Group, response: Response) -> float:
        charges = (each.price * each.limit.of(group, response) / each.limit.unit for each in self.multipliers.values())
        return math.fsum(charges)

    def charged(
        self, fresh: Sequence[Group], trained: Sequence[Group], policy: PolicyModel, version: int
    ) -> list[Group]:
        """Learns from the groups an iteration sampled, and prices those it trains on. With limits, a collective.

        Responses that continue a prefix are priced but not measured, because the policy did not choose their beginning.

        Args:
            fresh: Groups that this rank has sampled in the iteration.
            trained: Groups that this rank trains on, fresh and stored.
            policy: Policy that scores under the reference if a limit needs it.
            version: Present policy version.
        """
        if not self.multipliers:
            return list(trained)
        if self.need_reference:
            scored = with_kl([*fresh, *trained], policy, version)
            fresh, trained = scored[: len(fresh)], scored[len(fresh) :]
        mine = [self._mean_costs(group) for group in fresh if not group.prefix_tokens]
        everyones = [costs for of_rank in all_gather_object(mine) for costs in of_rank]
        for place, each in enumerate(self.multipliers.values()):
            each.measured([costs[place] for costs in everyones])
        return self.priced(trained)

    def _mean_costs(self, group: Group) -> list[float]:
        responses = group.responses
        limits = [each.limit for each in self.multipliers.values()]
        return [math.fsum(limit.of(group, response) for response in responses) / len(responses) for limit in limits]

    def metrics(self) -> dict[str, float]:
        """Returns limits/NAME/value and the other metrics of each limit."""
        found = {name: each.metrics() for name, each in self.multipliers.items()}
        return {f"limits/{name}/{key}": value for name, numbers in found.items() for key, value in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each multiplier, by the name of its limit."""
        return {name: each.state_dict() for name, each in self.multipliers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; a limit that the checkpoint lacks begins anew."""
        for name, each in self.multipliers.items():
            if name in state:
                each.load_state_dict(state[name])


def check_names(names: Iterable[str]) -> None:
    """Raises SettingError for names that no metric can have."""
    for name in names:
        if not is_part(name):
            first = re.split(r"[^\w-]", name)[0] or "length"
            raise SettingError(
                f"data.limits has '{name}', but a limit's name has {RULE}; give its settings "
                f"together, as in --data.limits.{first} '{{bound: 300, k: 1}}'"
            )


def with_kl(groups: Sequence[Group], policy: PolicyModel, version: int) -> list[Group]:
    """Adds the component "kl" to the groups' responses: the mean of behave - reference log-probs, in nats per token.

    It is the k1 estimate of the divergence of the policy that sampled them. A group that occurs twice is scored once.

    Args:
        groups: Fresh or stored groups.
        policy: Policy that scores under its reference. The pass is a collective if its weights are sharded.
        version: Present policy version.
    """
    distinct = {id(group): group for group in groups}
    found = iter(policy.reference_scores(Minibatch(list(distinct.values()), version, 0)))
    scored = {key: replace(g, responses=[_scored(r, next(found)) for r in g.responses]) for key, g in distinct.items()}
    return [scored[id(group)] for group in groups]


def _scored(response: Response, reference_logp: torch.Tensor) -> Response:
    divergence = (response.behave_logp - reference_logp).double().mean()
    return replace(response, parts=response.parts | {KL: float(divergence)})
