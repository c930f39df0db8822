"""README.md of an exported folder: what the policy is, what it began with, how it was trained and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from popo_lightning import __version__
from popo_lightning.cli.export.base_model import BaseModel
from popo_lightning.cli.export.evaluations import Measured
from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.hidden_secrets import shown_command, without_secrets
from popo_lightning.core.markdown import markdown_table
from popo_lightning.evaluation.benchmarks import MEAN
from popo_lightning.tasks.sources import HUB_ID

CARD = "README.md"
ACCURACY = re.compile(r"greedy|(?:avg|pass)_at_\d+|avg")  # its label
LABEL = re.compile(r"[a-z0-9_]+")  # label of an evaluation's number
TOLD = {  # settings in the first table, by their names there
    "optimizer": "model.optimizer.class_path",
    "learning rate": "model.optimizer.init_args.lr",
    "groups": "data.composer.class_path",
    "advantage": "model.advantage.class_path",
    "behavior weight": "model.behave_weight.class_path",
    "trust region": "model.trust_region.class_path",
    "problems an iteration": "data.problems_per_iteration",
    "responses a problem": "data.group_size",
    "temperature": "data.temperature",
    "response limit in tokens": "data.max_new_tokens",
}


@dataclass(frozen=True)
class Told:
    """Facts for a model card.

    Args:
        saved: The policy.
        base: Model that the run began with.
        dtype: dtype of the written weights.
        sees_images: Whether the policy is a vision-language model.
        command: Command that exports it.
        measured: Newest evaluation of the policy or of an earlier one; None if there is none.
        adapter: Whether only adapters are written.
    """

    saved: SavedPolicy
    base: BaseModel
    dtype: str
    sees_images: bool
    command: str
    measured: Measured | None
    adapter: bool = False

    @property
    def names(self) -> tuple[str, str, int | None]:
        """Method, task and seed; "unknown" and None if an earlier version wrote the checkpoint."""
        record = self.saved.record
        return ("unknown", "unknown", None) if record is None else (record.method, record.task, record.seed)


def model_card(told: Told) -> str:
    """The card with its front matter.

    Args:
        told: Facts for the card.
    """
    method, task, _ = told.names
    parts = [
        f"# {_code(told.base.name)} trained by {_code(method)} on {_code(task)}",
        f"A policy trained by reinforcement learning with verifiable rewards, by popo_lightning {__version__}.",
        markdown_table(("", ""), list(_facts(told))),
        "## Evaluation",
        *_evaluation(told),
        "## Settings",
        "Those that decide what was trained:",
        _fenced("yaml", yaml.safe_dump(without_secrets(told.saved.settings), sort_keys=False)),
        "## Commands",
        *_commands(told),
    ]
    return f"---\n{_front_matter(told)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(told: Told) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    method, task, seed = told.names
    results = [
        EvalResult(
            task_type=_pipeline(told),
            dataset_type=_plain(name),
            dataset_name=name,
            metric_type="accuracy",
            metric_name=label,
            metric_value=value,
        )
        for name, numbers in (told.measured.benchmarks.items() if told.measured is not None else ())
        for label, value in numbers.items()
        if name != MEAN and ACCURACY.fullmatch(label)
    ]
    hub: dict[str, Any] = (
        {"base_model": told.base.hub_id, "base_model_relation": "adapter" if told.adapter else "finetune"}
        if told.base.hub_id
        else {}
    )
    data = ModelCardData(
        library_name="peft" if told.adapter else "transformers",
        pipeline_tag=_pipeline(told),
        tags=["popo_lightning", "reinforcement-learning", "rlvr", _plain(method), _plain(task)],
        datasets=list(_data_sets(told.saved)) or None,
        model_name=f"{told.base.name}-{method}-{task}-seed{seed}" if results else None,
        eval_results=results or None,
        **hub,
        popo_lightning={
            "version": __version__,
            "method": method,
            "task": task,
            "seed": seed,
            "iterations": told.saved.iterations,
            "base_model": told.base.name,
            "base_model_revision": told.base.revision,
        },
    )
    return data.to_yaml()


def _facts(told: Told) -> Iterator[tuple[str, str]]:
    method, task, seed = told.names
    yield "base model", told.base.name
    yield "its revision", told.base.revision or "a folder without one"
    yield "method, task, seed", f"{method}, {task}, {'unknown' if seed is None else seed}"
    under_way = told.saved.under_way
    yield "rollout iterations", f"{told.saved.iterations}" + (f" and {under_way} optimizer steps" if under_way else "")
    yield "checkpoint", told.saved.checkpoint.name
    yield "weights", told.dtype
    for name, setting in TOLD.items():
        value = told.saved.setting(setting)
        if value is not None:
            yield name, str(value).rpartition(".")[2] if setting.endswith("class_path") else str(value)


def _evaluation(told: Told) -> Iterator[str]:
    measured = told.measured
    if measured is None:
        yield "None was made before these weights were saved."
        return
    these = measured.iteration == told.saved.iterations and not told.saved.under_way
    which = "of these weights" if these else "of earlier weights than these, which were not evaluated"
    yield f"The last one by the run, after iteration {measured.iteration}: {which}."
    labels = list(dict.fromkeys(label for numbers in measured.benchmarks.values() for label in numbers))
    labels = [label for label in labels if LABEL.fullmatch(label) and label != "seconds"]
    rows = [
        [name, *(f"{numbers[label]:.4g}" if label in numbers else "" for label in labels)]
        for name, numbers in measured.benchmarks.items()
    ]
    yield markdown_table(("benchmark", *labels), rows)
    if measured.settings:
        yield "\n".join(f"- {_code(name)}: {_code(_settings_text(its))}" for name, its in measured.settings.items())


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())


def _commands(told: Told) -> Iterator[str]:
    command = told.saved.command
    made = [command] if command else []
    yield _fenced("bash", "\n".join(map(shown_command, [*made, told.command])))
    if not command:
        yield "The command that trained it is not recorded; the settings above are."


def _data_sets(saved: SavedPolicy) -> Iterator[str]:
    """Hub ids of the data sets that the policy was trained on."""
    sources = saved.setting("data.task.init_args.train")
    for source in sources if isinstance(sources, list) else ():
        path = source.get("path") if isinstance(source, Mapping) else None
        if isinstance(path, str) and path.count("/") == 1 and HUB_ID.fullmatch(path) and not Path(path).suffix:
            yield path


def _pipeline(told: Told) -> str:
    return "image-text-to-text" if told.sees_images else "text-generation"


def _plain(name: str) -> str:
    """A name in the form of a tag."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unnamed"


def _fenced(language: str, text: str) -> str:
    """A fenced block that no text inside can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _code(text: str) -> str:
    """A text on one line and as code, since names are not trusted."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return "`" + line.replace("`", "'") + "`"
