"""The loop on one page and `popo fit` are the same method: same problems, same tokens, same weights, bit for bit."""

from __future__ import annotations

import ast
import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tiny_models import NUMBERS, REPOSITORY, TASK, method, popo
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from popo_lightning.objectives import Objective
from popo_lightning.policy import PolicyModule
from popo_lightning.tasks.countdown import CountdownSteps

EXAMPLES = REPOSITORY / "examples"
PAGE = EXAMPLES / "popo_in_one_file.py"
ITERATIONS = 6
# Small enough for seconds, and with rates and bounds at which each rule of the page matters within six iterations.
SETTINGS: dict[str, Any] = {
    "NUMBERS": TASK["numbers"],
    "LARGEST": TASK["largest_number"],
    "MIN_SOLUTIONS": TASK["least_ways"],
    "ORDERS": TASK["orders"],
    "HELD_OUT_SHARE": TASK["held_out_share"],
    "HELD_OUT": TASK["held_out_problems"],
    "PROBLEMS": 12,
    "MINIBATCHES": 3,
    "MAX_NEW_TOKENS": 10,
    "LEARNING_RATE": 6e-3,
    "CAPACITY": 9,
    "MAX_AGE": 2,
}
COMMAND = ["--data.problems_per_iteration", "12", "--data.minibatches", "3", "--data.max_new_tokens", "10"]
COMMAND += ["--data.composer.init_args.buffer.capacity", "9", "--data.composer.init_args.buffer.max_age", "2"]
COMMAND += ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.betas", "[0.9, 0.98]"]
COMMAND += ["--model.optimizer.weight_decay", "0.0", "--data.engine", "engines_for_tests.Recording"]
COMMAND += ["--evaluation.every_n_iterations", "0", "--trainer.max_epochs", str(ITERATIONS)]
COMMAND += ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "-1"]
# One row a sequence and transformers' own attention, as on the page: then every sum has the same terms in the same order.
PLAIN_ROWS = ["--model.attention", "sdpa", "--model.shared_prompts", "false"]

Weights = dict[str, Tensor]
Calls = dict[int, Any]


def page(source: str | None = None, **constants: Any) -> Any:
    """The page as a module of its own, with other constants or another source."""
    module = ModuleType("page")
    exec(compile(source or PAGE.read_text(), PAGE, "exec"), module.__dict__)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module


def fit(config: Path, folder: Path, *args: str) -> tuple[list[Weights], Calls]:
    """The weights of `popo fit` after each iteration, and what was sampled."""
    cli = popo("fit", "--config", config, *method("popo"), *COMMAND, *args, "--run.folder", folder)
    found = []
    for path in sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1])):
        state = torch.load(path, weights_only=True)["state_dict"]
        found.append({name.removeprefix("model."): weight for name, weight in state.items()})
    assert len(found) == ITERATIONS
    return found, cli.datamodule.engine.calls


def weights_by_page(module: Any, policy: Path, generate: Callable[..., Any]) -> Iterator[Weights]:
    """The page's weights after each iteration."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    for _ in islice(module.train(model, tokenizer, 1, generate), ITERATIONS):
        yield {name: weight.clone() for name, weight in model.state_dict().items()}


def played(calls: Calls) -> Callable[..., Any]:
    """Gives what the framework sampled for these very prompts under this very seed."""

    def generate(model: Any, prompts: list[list[int]], seed: int) -> list[list[tuple[Tensor, Tensor]]]:
        asked, responses = calls[seed]
        assert asked == prompts
        return [[(each.token_ids, each.behave_logp) for each in group] for group in responses]

    return generate


def same(left: Weights, right: Weights) -> bool:
    return all(torch.equal(weight, right[name]) for name, weight in left.items())


@pytest.fixture(scope="module")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Weights], Calls]:
    return fit(config, tmp_path_factory.mktemp("plain"), *PLAIN_ROWS, "--model.optimizer.lr", "6e-3")


def test_weights_are_the_frameworks(policy: Path, plain: tuple[list[Weights], Calls]) -> None:
    """Bit for bit after each of six iterations, given the tokens and log-probs that the framework sampled."""
    expected, calls = plain
    found = list(weights_by_page(page(**SETTINGS), policy, played(calls)))
    assert [same(left, right) for left, right in zip(found, expected, strict=True)] == [True] * ITERATIONS
