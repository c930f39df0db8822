"""Keeps the state of an objective's rules in checkpoints, and notices what they forget."""

from __future__ import annotations

from typing import Any

from popo_lightning.core.kept_state import KeepsState, Watch, class_name
from popo_lightning.objectives.advantages import Advantage
from popo_lightning.objectives.objective import Objective


class RuleStates:
    """The rules in the slots of an objective, by the settings that name them.

    A checkpoint holds the state of the first rank, so a rule that keeps state has to keep the same on all ranks.

    Args:
        advantage: The advantage.
        objective: The objective with its other rules, all in their initial state.

    Raises:
        SettingError: A rule names attributes that it does not have.
    """

    def __init__(self, advantage: Advantage, objective: Objective) -> None:
        self._rules: dict[str, KeepsState] = {
            "model.advantage": advantage,
            "model.behave_weight": objective.behave_weight,
            "model.trust_region": objective.trust_region,
            "model.aggregation": objective.aggregation,
        } | {f"model.regularizers[{place}]": rule for place, rule in enumerate(objective.regularizers)}
        self._watches = [Watch(setting, rule) for setting, rule in self._rules.items()]

    def state_dict(self) -> dict[str, Any]:
        """Class and state of each rule that keeps any. Warns of attributes that changed and are not kept."""
        for watch in self._watches:
            watch.tell()
        found = {name: {"class": class_name(rule), "state": rule.state_dict()} for name, rule in self._rules.items()}
        return {name: kept for name, kept in found.items() if kept["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; a rule of another class begins anew."""
        for name, kept in state.items():
            rule = self._rules.get(name)
            if rule is not None and class_name(rule) == kept["class"]:
                rule.load_state_dict(kept["state"])
