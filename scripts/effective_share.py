"""Measures the share of groups whose rewards differ for an embedded Countdown policy before training.

Usage: python scripts/effective_share.py --config configs/task/countdown_10m.yaml [--device cuda] [--problems 256]
       [--warm_start '{"right": 0.1}'] [--task '{"min_ways": 2}'] [--out share.json]

Reads model.warm_start, data.task, data.group_size and data.max_new_tokens of the task file, builds the policy if it is
not in the cache, and samples train problems at temperature 1 with the transformers engine. "bounds" are the shares of
two policies that write only true steps: one that aims at nothing, and one that answers as its examples do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from popo_lightning.core.problems import Problem
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import CountdownWarmStart, random_steps


def main() -> None:
    """Prints the numbers as JSON, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--warm_start", type=json.loads, default={}, help="settings of it, in place of the file's")
    parser.add_argument("--task", type=json.loads, default={}, help="settings of it, in place of the file's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    found = measure(config, options.device, options.problems, options.warm_start, options.task)
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def measure(
    config: dict[str, Any], device: str, problems: int, changed: dict[str, Any], changed_task: dict[str, Any]
) -> dict[str, Any]:
    """Builds, samples and grades.

    Args:
        config: A task file's content.
        device: Device of the engine.
        problems: Number of problems, drawn from the train problems.
        changed: Settings of the warm start in place of the file's.
        changed_task: Settings of the task in place of the file's.
    """
    settings = config["model"]["warm_start"].get("init_args", {}) | changed
    data = config["data"]
    began = time.perf_counter()
    folder = CountdownWarmStart(**settings).folder()
    built = time.perf_counter() - began
    task = CountdownSteps(**data["task"].get("init_args", {}) | changed_task)
    asked = random.Random(0).sample(task.train_problems(), problems)
    encoder = PromptEncoder(folder, data["max_prompt_tokens"])
    longest = data["max_prompt_tokens"] + data["max_new_tokens"]
    engine = TransformersEngine()
    engine.start(EngineContext(folder, torch.device(device), torch.float32, 0, 1, longest))
    prompts = [encoder.encode(problem) for problem in asked]
    began = time.perf_counter()
    sampled = engine.generate(prompts, data["group_size"], Sampling(data["max_new_tokens"]), seed=0)
    generated = time.perf_counter() - began
    parts = [[task.verify(p.answer, r.text) for r in rs] for p, rs in zip(asked, sampled, strict=True)]
    effective = [len({part["score"] for part in group}) > 1 for group in parts]
    levels = [problem.info["level"] for problem in asked]
    flat = [part for group in parts for part in group]
    return {
        "effective_share": sum(effective) / len(effective),
        "effective_share_by_numbers": {
            str(level): _mean([e for e, at in zip(effective, levels, strict=True) if at == level])
            for level in sorted(set(levels))
        },
        "bounds": bounds(asked, settings, data["group_size"]),
        "accuracy": _mean([part["acc"] for part in flat]),
        "well_formed": _mean([part["format"] for part in flat]),
        "problems": problems,
        "group_size": data["group_size"],
        "warm_start": settings,
        "parameters": sum(parameter.numel() for parameter in engine._model.parameters()),
        "build_seconds": built,
        "generation_seconds": generated,
        "device": device,
    }


def bounds(asked: Sequence[Problem], settings: dict[str, Any], group_size: int, draws: int = 100) -> list[float]:
    """Expected effective shares without aim, and with the aim of the warm start's examples.

    Args:
        asked: Problems.
        settings: Settings of the warm start.
        group_size: Number of responses in a group.
        draws: Number of random answers, which estimate how often a problem is solved by chance.
    """
    examples, draw = CountdownWarmStart(**settings), random.Random(0)
    found = []
    for right in (0.0, examples.right):
        shares = []
        for problem in asked:
            numbers, end = problem.answer["numbers"], f"={problem.answer['target']}"
            hits = sum(random_steps(numbers, examples.operations, draw).endswith(end) for _ in range(draws)) / draws
            solved = right + (1 - right) * hits
            shares.append(1 - (1 - solved) ** group_size - solved**group_size)
        found.append(_mean(shares))
    return found


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
