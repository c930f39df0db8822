"""Did you mean: finds the known name nearest to a misspelt one."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ALIKE = 0.65  # smallest difflib ratio of similar names
SHORTEST, BEGUN = 3, 0.9  # an abbreviation of at least SHORTEST letters counts as BEGUN similar
# Names that users try, and the settings that they mean.
HABITS = {"model.learning_rate": "model.optimizer.init_args.lr", "model.lr": "model.optimizer.init_args.lr"}
# Names of other libraries' settings, without what stands before the last dot, and the settings that they mean.
OF_OTHERS = {
    "dir": "run.folder",
    "output_dir": "run.folder",
    "num_generations": "data.group_size",
    "num_iterations": "data.ppo_epochs",
    "steps_per_generation": "data.minibatches",
    "train_batch_size": "data.problems_per_iteration",
    "max_completion_length": "data.max_new_tokens",
    "max_response_length": "data.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "per_device_train_batch_size": "model.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "model.micro_batch_tokens",
    "grad_clip": "model.max_grad_norm",
    "epsilon": "model.trust_region.clip_low",
    "epsilon_high": "model.trust_region.clip_high",
    "clip_ratio_low": "model.trust_region.clip_low",
    "clip_ratio_high": "model.trust_region.clip_high",
    "loss_agg_mode": "model.aggregation",
    "reward_funcs": "data.task.verifier",
    "model_name_or_path": "model.path",
    "peft_config": "model.lora",
    "seed": "seed_everything",
    "max_steps": "trainer.max_epochs",
    "total_training_steps": "trainer.max_epochs",
    "total_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "save_steps": "checkpoint.every_n_epochs",
    "save_freq": "checkpoint.every_n_epochs",
    "eval_steps": "evaluation.every_n_iterations",
    "test_freq": "evaluation.every_n_iterations",
    "resume_from_checkpoint": "run.resume",
    "report_to": "trainer.logger",
}
PACKAGE = Path(__file__).parent.parent
# The rooms with classes that settings of model, data, proximal and parameter_hook may name.
ROOMS = ("objectives", "methods", "model", "replay", "engines", "tasks", "toys", "verifiers", "proximal", "grading")
SLOTS = ("callbacks", "evaluation", *ROOMS)
OTHERS = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "torch.optim",
    "torch.optim.lr_scheduler",
)


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to a given one, or None if none is similar.

    Names have parts between dots or slashes. The last part decides; a missing or misspelt beginning is tolerated.
    """
    found = max(known, key=lambda name: _likeness(given, name), default=None)
    return found if found is not None and _likeness(given, found) > 0 else None


def _likeness(given: str, name: str) -> float:
    (stem, leaf), (known_stem, known_leaf) = _parts(given), _parts(name)
    by_leaf, by_stem = _ratio(leaf, known_leaf), _ratio(stem, known_stem)
    if len(leaf) >= SHORTEST and known_leaf.startswith(leaf):
        by_leaf = max(by_leaf, BEGUN)
    if by_leaf < ALIKE or (by_stem < ALIKE and stem and by_leaf < 1):
        return 0.0
    return by_leaf + by_stem


def _parts(name: str) -> tuple[str, str]:
    stem, _, leaf = name.replace("/", ".").rpartition(".")
    return stem, leaf


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower()).ratio()


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """Returns the end of a sentence about an unknown name; `otherwise` if no known name is near."""
    found = nearest(given, known)
    return f"did you mean {found}?" if found is not None else otherwise


def nearest_setting(given: str, settings: Iterable[str]) -> str | None:
    """Like :func:`nearest`, for settings of the command line and the names in HABITS and OF_OTHERS."""
    known = list(settings)
    stem, _, leaf = given.rpartition(".")
    near = nearest(given, known)
    own = near is not None and near.rpartition(".")[0] == stem != ""
    meant = None if own else OF_OTHERS.get(leaf)
    if meant is not None and ".".join(meant.split(".")[:2]) in known:  # further names are those of a class's arguments
        return meant
    found = nearest(given, [*known, *HABITS])
    return HABITS.get(found, found) if found is not None else None


def nearest_owner(given: str, settings: Iterable[str]) -> str | None:
    """Corrects the class's setting in the name of a setting inside it, such as model.behave_wieght.cap."""
    parts, known = given.split("."), list(settings)
    for length in range(len(parts) - 1, 1, -1):
        if (found := nearest(".".join(parts[:length]), known)) is not None:
            return ".".join((found, *parts[length:]))
    return None


def nearest_class(path: str) -> str | None:
    """The import path of the class that a class_path most likely means, or None."""
    name = path.rpartition(".")[2]
    found = nearest(name, class_paths())
    return class_paths()[found] if found is not None else None


def object_at(path: str) -> Any:
    """The class or function that a class_path names. A package's attribute goes before its module of the same name.

    Raises:
        ImportError: The module cannot be imported.
        AttributeError: The module has no such name.
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def arguments_of(path: str) -> list[str]:
    """Names of the settings of a class or function; empty if it cannot be imported."""
    try:
        return [p for p in inspect.signature(object_at(path)).parameters if p != "self"]
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


@cache
def class_paths() -> dict[str, str]:
    """Import paths of the classes that settings may name: this package's, Lightning's and torch's, by class name."""
    found: dict[str, str] = {}
    for module in OTHERS:
        here = import_module(module)
        found |= {name: f"{module}.{name}" for name in vars(here) if inspect.isclass(getattr(here, name))}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in SLOTS:
            continue
        module = ".".join(("popo_lightning", *parts))
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            parent = module.rpartition(".")[0]
            short = parent != "popo_lightning" and hasattr(sys.modules.get(parent), name)
            found[name] = f"{parent if short else module}.{name}"
    return found
