"""Help of a subcommand: the project's own settings first, in groups, and everything else behind --help_all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from textwrap import fill
from typing import Any

HELP_ALL = "--help_all"
GROUPS = {  # groups of settings, in the order of --help
    "run": "names, folders, resuming",
    "data": "task, engine, rollouts, replay",
    "model": "policy, objective, optimizer",
    "evaluation": "when and how held-out problems are asked",
    "checkpoint": "when checkpoints are written, and which are kept",
    "proximal": "the center of the trust region",
    "parameter_hook": "what changes weights between steps",
    "samples": "samples.jsonl",
    "progress": "this terminal",
    "monitor": "metrics",
    "health": "warnings",
}
FIRST = ("help", "config", "print_config", "seed_everything", "plan", "card_gib", "ckpt_path", "help_all")
OF_A_CHECKPOINT = ("auto_insert_metric_name", "enable_version_counter", "verbose", "train_time_interval")
TRAINER = (
    "max_epochs",
    "max_time",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "accelerator",
    "callbacks",
    "logger",
)


TEXTS = {  # replace Lightning's texts
    "seed_everything": "Seed of all random draws, in the run's folder name as seedN.",
    "config": "YAML file of settings, or the name of one that popo configs lists; each goes over those before it.",
    "ckpt_path": "Checkpoint to resume, to evaluate, or to begin a new run from: a file, or a folder of shards.",
}


class HelpAll(argparse.Action):
    """Prints every setting, including the trainer's and Lightning's."""

    def __init__(self, option_strings: Any, dest: str = argparse.SUPPRESS, **kwargs: Any) -> None:
        text = "Show every setting, the trainer's and Lightning's among them, and exit."
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=text)

    def __call__(self, parser: Any, *_: Any) -> None:
        """Prints the help and exits with 0."""
        parser.everything = True
        parser.print_help()
        parser.exit()


def add_help_all(parser: Any) -> None:
    """Adds --help_all to a subcommand's parser, and replaces Lightning's help where this project differs."""
    for action in parser._actions:
        action.help = TEXTS.get(action.dest, action.help)
    parser.add_argument(HELP_ALL, action=HelpAll)


def own_help(parser: Any) -> str:
    """Help of a subcommand: its own settings by group, each with its description.

    Args:
        parser: Parser of the subcommand.
    """
    formatter = parser._get_formatter()
    for title, description, actions in sections(parser):
        formatter.start_section(title)
        formatter.add_text(description)
        formatter.add_arguments(actions)
        formatter.end_section()
    name = parser.prog.rpartition(" ")[2]
    usage = f"usage: popo {name} --config FILE [--config FILE ...] [--SETTING VALUE ...]\n"
    trainers = ", ".join(f"--trainer.{each}" for each in TRAINER)
    ends = (
        f"Lightning's trainer has {trainers} and more; trainer.max_epochs counts iterations. {HELP_ALL} describes all.",
        f"Of a class: popo {name} --data.composer.help PrioritizedGroupReplay, and likewise for every other slot.",
    )
    return "\n".join((usage, formatter.format_help(), *(fill(end, 100, break_on_hyphens=False) for end in ends), ""))


def sections(parser: Any) -> Iterator[tuple[str, str | None, list[Any]]]:
    """Groups of the short help: title, description, actions."""
    by_group: dict[str, list[Any]] = {}
    for action in parser._actions:
        name = next((option.lstrip("-") for option in action.option_strings if option.startswith("--")), action.dest)
        by_group.setdefault(_group(name), []).append(action)
    yield "options", None, by_group.get("", [])
    for group, about in GROUPS.items():
        if actions := by_group.get(group):
            yield group, about, actions


def _group(name: str) -> str:
    """Group that an option is shown in: "" for the first one, "-" for a hidden option."""
    group, _, rest = name.partition(".")
    if not rest:
        return "" if name in FIRST else group if name in ("proximal", "parameter_hook") else "-"
    hidden = rest.endswith("help") or (group == "checkpoint" and rest in OF_A_CHECKPOINT)
    return "-" if hidden or group not in GROUPS else group
