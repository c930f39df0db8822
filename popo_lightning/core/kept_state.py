"""Saves what a rule keeps between iterations: the attributes that its class names. Forgotten ones are reported."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError

# Types that a checkpoint read with weights_only=True returns unchanged, besides the classes in torch's safe globals:
# Problem, Response, Group and Minibatch.
LEAVES = (type(None), bool, int, float, str, bytes, Tensor)

log = logging.getLogger(__name__)


class KeepsState:
    """An object whose class names the attributes that a checkpoint keeps.

    Attributes:
        state: Attributes that decide later iterations; a class adds its own to those of its bases. They hold numbers,
            text, tensors, problems, responses and groups, in lists, dicts, tuples and sets, in one deque, or in another
            object that has a state_dict.
        transient: Attributes that change and need no saving: they are only reported, or computed anew.
    """

    state: tuple[str, ...] = ()
    transient: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The attributes that ``state`` names, in new containers.

        Raises:
            SettingError: A checkpoint cannot hold an attribute.
        """
        return {name: _stored(self, name) for name in names(self, "state")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; a deque keeps its present length and drops the first entries."""
        for name in names(self, "state"):
            if name not in state:
                raise SettingError(
                    f"the checkpoint has nothing of {type(self).__name__}.{name}, which its `state` names by now; "
                    "resume with the class as it was, or start a new run (run.folder)"
                )
            setattr(self, name, _restored(getattr(self, name), state[name]))


class Watch:
    """Reports attributes of a rule that change but are not saved.

    A rule with its own state_dict is not watched.

    Args:
        setting: Setting that names the rule.
        rule: The rule in its initial state.

    Raises:
        SettingError: The rule names attributes that it does not have.
    """

    def __init__(self, setting: str, rule: KeepsState) -> None:
        self.rule = rule
        self._words = f"{setting} {type(rule).__name__}"
        check_names(setting, rule)
        self._began = self._fingerprints()
        self._told: set[str] = set()

    def tell(self) -> None:
        """Warns of each such attribute once."""
        for name, found in self._fingerprints().items():
            if found != self._began.get(name) and name not in self._told:
                self._told.add(name)
                log.warning(
                    "%s changes '%s', which neither its `state` nor its `transient` names, so that a resumed run "
                    "begins without it; name it in `state` if it decides later iterations, else in `transient`",
                    self._words,
                    name,
                )

    def _fingerprints(self) -> dict[str, bytes | int]:
        if type(self.rule).state_dict is not KeepsState.state_dict:
            return {}
        known = {*names(self.rule, "state"), *names(self.rule, "transient")}
        return {name: _fingerprint(value) for name, value in vars(self.rule).items() if name not in known}


def check_names(setting: str, rule: KeepsState) -> None:
    """Raises SettingError if a rule in its initial state names an attribute which it does not have."""
    if missing := [name for name in names(rule, "state") if not hasattr(rule, name)]:
        raise SettingError(
            f"{setting} {type(rule).__name__} has no '{missing[0]}', which its `state` names; set it in __init__"
        )


def class_name(rule: object) -> str:
    """Name of a rule's class, with its module."""
    return f"{type(rule).__module__}.{type(rule).__qualname__}"


def names(rule: KeepsState, kind: str) -> list[str]:
    """Attributes that the class of a rule and its bases name as "state" or as "transient".

    Raises:
        SettingError: The names of a class are not a tuple of text.
    """
    found: list[str] = []
    for cls in reversed(type(rule).__mro__):
        named = vars(cls).get(kind, ())
        if not isinstance(named, tuple | list) or not all(isinstance(name, str) for name in named):
            raise SettingError(
                f"{cls.__name__}.{kind} is {named!r}; give a tuple of attribute names, such as ('buffer',)"
            )
        found += named
    return list(dict.fromkeys(found))


def containers_copied(state: Any) -> Any:
    """Copies the dicts, lists and sets of a state; tensors and numbers are shared."""
    if isinstance(state, dict):
        return {key: containers_copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [containers_copied(value) for value in state]
    if isinstance(state, set):
        return set(state)
    return tuple(map(containers_copied, state)) if type(state) is tuple else state


def _stored(rule: KeepsState, name: str) -> Any:
    value = getattr(rule, name)
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, deque):
        value = list(value)
    elif isinstance(value, OrderedDict | defaultdict):
        value = dict(value)
    allowed = {*LEAVES, *torch.serialization.get_safe_globals()}
    if (strange := _strange(value, allowed)) is not None:
        raise SettingError(
            f"{type(rule).__name__}.{name} holds an object of class {strange.__name__}, which a checkpoint cannot give "
            "back; keep numbers, text, tensors, problems, responses and groups in lists, dicts, tuples and sets"
        )
    return containers_copied(value)


def _strange(value: Any, allowed: set[Any]) -> type | None:
    """The first class inside a value that a checkpoint cannot hold; None if there is none."""
    kind = type(value)
    if kind in allowed:
        return None
    if kind is dict:
        parts = [*value, *value.values()]
    elif kind in (list, tuple, set):
        parts = list(value)
    else:
        return kind
    return next((found for part in parts if (found := _strange(part, allowed)) is not None), None)


def _restored(present: Any, saved: Any) -> Any:
    if hasattr(present, "load_state_dict"):
        present.load_state_dict(saved)
        return present
    own = containers_copied(saved)
    if isinstance(present, deque):
        return deque(own, present.maxlen)
    if isinstance(present, defaultdict):
        return defaultdict(present.default_factory, own)
    return OrderedDict(own) if isinstance(present, OrderedDict) else own


def _fingerprint(value: Any) -> bytes | int:
    """A value that changes when the object does; the id of a module, which others save, and of what cannot be pickled.

    It is a digest, because a rule may hold a copy of the weights.
    """
    if isinstance(value, torch.nn.Module) or hasattr(value, "lightning_module"):
        return id(value)
    digest = hashlib.blake2b(digest_size=16)
    file: Any = SimpleNamespace(write=digest.update)
    try:
        pickle.Pickler(file).dump(value)
    except Exception:  # pickling may raise any exception
        return id(value)
    return digest.digest()
