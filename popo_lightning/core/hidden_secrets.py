"""Commands and settings without keys and passwords, for pages and cards that others see."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

KEYS = "(api|access|private|openai|anthropic|wandb|account|client|signing)_?key"  # reward_key is none
NAMES = rf"({KEYS}|secret|passw|credential|auth_?token|access_?token|bearer|authorization)"
SECRET = re.compile(rf"{NAMES}|(^|[._-])(hf_|hub_)?token$", re.IGNORECASE)
NEAR = re.compile(
    "key|secret|passw|credential|token|bearer|authorization|://", re.IGNORECASE
)  # without which no name is secret
INSIDE = re.compile(rf"({NAMES}|token)\W*[:=]", re.IGNORECASE)
# A value that holds a secret whatever its name is: a user's password in an address, a query's key, a header.
TELLING = re.compile(rf"://[^/\s:@]*:[^/\s@]+@|[?&;]({NAMES}|(\w+_)?token)=|\bbearer\s+\S", re.IGNORECASE)
HIDDEN = "(not shown)"


def is_secret(name: str) -> bool:
    """Whether a setting of this name, such as trainer.logger.init_args.api_key, is nobody else's business."""
    return SECRET.search(name) is not None


def shown_command(command: str) -> str:
    """A command line, as shlex.join gives it, with the values of secret settings hidden, also within JSON or YAML."""
    try:
        words = shlex.split(command)
    except ValueError:  # whose quotes do not close
        return HIDDEN if NEAR.search(command) else command
    found, hides = [], False  # whether words are the value of a secret option
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("-"):
            secret = is_secret(option)
            hides = secret and not equals
            hidden = secret and equals
            found.append(f"{shlex.quote(option)}={HIDDEN}" if hidden else shlex.quote(option + equals + shown(value)))
        else:
            found.append(HIDDEN if hides else shlex.quote(shown(word)))
    return command if found == [*map(shlex.quote, words)] else " ".join(found)


def shown(value: str) -> str:
    """A setting's value, which may be several settings as JSON or YAML, with those of secret names hidden."""
    if not NEAR.search(value):
        return value
    try:
        if "&" in value and "*" in value:  # aliases of YAML can make a tree without an end
            raise ValueError
        content = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return HIDDEN if TELLING.search(value) or INSIDE.search(value) else value
    kept = without_secrets(content)
    if kept == content:
        return HIDDEN if TELLING.search(value) else value  # it may stand in a comment
    return kept if isinstance(kept, str) else json.dumps(kept, default=str)


def without_secrets(content: Any) -> Any:
    """Settings in mappings and lists with the values of secret names hidden."""
    if isinstance(content, Mapping):
        return {name: HIDDEN if is_secret(str(name)) else without_secrets(below) for name, below in content.items()}
    if isinstance(content, list):
        return [without_secrets(each) for each in content]
    return HIDDEN if isinstance(content, str) and TELLING.search(content) else content
