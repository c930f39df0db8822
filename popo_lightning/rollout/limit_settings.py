"""A limit: a cost of responses, its maximum mean, and how its multiplier learns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response

LENGTH, TRUNCATED, ERROR = "length", "truncated", "_error"
KL = "kl"  # also the component that `with_kl` adds to responses
KNOWN = (LENGTH, TRUNCATED, KL)
EXAMPLES = {LENGTH: "300", TRUNCATED: "0.02", KL: "0.05"}


@dataclass
class Limit:
    """A maximum mean cost of responses, with a multiplier that learns (docs/limits.md).

    Args:
        bound: Maximum mean cost over responses. Its unit is tokens for length, a fraction for truncated and
            COMPONENT_error, nats per token for kl, and the verifier's own unit for a reward component.
        cost: length, truncated, kl, a reward component, or COMPONENT_error for 1 minus a component. null takes the
            name of the limit.
        k: Number of standard errors over groups added to the mean cost before it is compared with the bound.
        c: Amount by which the multiplier rises at once for every unit of cost above the bound.
        lr: Learning rate of log lambda, which Adam moves once per iteration. 0 keeps lambda; with c 0 the limit is a
            fixed penalty.
        start: Value of lambda at the start of a run.
        unit: Cost that the multiplier prices. null takes the bound for length and kl, and 1 for all other costs.
    """

    bound: float
    cost: str | None = None
    k: float = 0.5
    c: float = 10.0
    lr: float = 0.05
    start: float = 0.1
    unit: float | None = None

    def named(self, name: str, max_new_tokens: int) -> NamedLimit:
        """Checks the limit and returns it with its cost and unit.

        Args:
            name: Name in data.limits.
            max_new_tokens: Maximum tokens of a response.

        Raises:
            SettingError: A number has no meaning, no response could break the limit, or none could keep it.
        """
        setting, cost = f"data.limits.{name}", self.cost or name
        at_least(f"{setting}.k", self.k, 0, ", such as 0.5; 0 compares the mean itself")
        at_least(f"{setting}.c", self.c, 0, ", such as 10; 0 leaves all to lambda")
        at_least(f"{setting}.lr", self.lr, 0, ", such as 0.05; 0 keeps lambda as it starts")
        above(f"{setting}.start", self.start, 0, "0.1")
        _check_bound(setting, cost, self.bound, max_new_tokens)
        unit = self.unit
        if unit is None:
            unit = self.bound if cost in (LENGTH, KL) else 1.0
        above(f"{setting}.unit", unit, 0, "1.0")
        return NamedLimit(self.bound, cost, self.k, self.c, self.lr, self.start, unit)


def _check_bound(setting: str, cost: str, bound: float, max_new_tokens: int) -> None:
    """Refuses bounds that every policy or no policy keeps. For reward components neither is known."""
    is_share = cost == TRUNCATED or cost.endswith(ERROR)
    if cost in KNOWN or is_share:
        above(f"{setting}.bound", bound, 0, EXAMPLES.get(cost, "0.01"))
    if cost == LENGTH and bound < 1:
        raise SettingError(f"{setting}.bound is {bound:g}, but a response has at least 1 token; use more, such as 300")
    if cost == LENGTH and bound >= max_new_tokens:
        raise SettingError(
            f"{setting}.bound is {bound:g}, which no response exceeds, since data.max_new_tokens is {max_new_tokens}; "
            "use less"
        )
    if is_share and bound >= 1:
        raise SettingError(f"{setting}.bound is {bound:g}, but a share never exceeds 1; use less, such as 0.02")


@dataclass
class NamedLimit(Limit):
    """A limit whose cost and unit are known."""

    cost: str = ""
    unit: float = 1.0

    def of(self, group: Group, response: Response) -> float:
        """Returns the cost of a response. A component that failed grading did not give is 0, and COMPONENT_error 1."""
        if self.cost == LENGTH:
            return float(group.prefix_tokens + len(response.token_ids))
        if self.cost == TRUNCATED:
            return float(response.finish_reason == "length")
        component = self.component(response.parts)
        value = response.parts.get(component, 0.0)
        return value if component == self.cost else 1.0 - value

    def component(self, known: Collection[str]) -> str:
        """Returns the reward component that the cost reads. One with the cost's own name takes precedence."""
        return self.cost if self.cost in known else self.cost.removesuffix(ERROR)
