"""The loop on one page and `popo fit` agree bit for bit: same problems, same tokens, same weights."""

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
from helpers.page_mutations import MUTATIONS
from helpers.places import REPOSITORY
from helpers.tiny_models import TASK, method, popo
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from popo_lightning.core.groups import Response
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.objectives.objective import Objective
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import CountdownWarmStart

PAGE = REPOSITORY / "examples" / "popo_in_one_file.py"
ITERATIONS = 8
# At these settings every rule of the page often matters: problems return in each iteration, about a third of the groups
# is replayed, and ratios and weights reach their bounds.
SMALL_TASK = TASK | {"largest_number": 3, "held_out_problems": 1}
CONSTANTS: dict[str, Any] = {
    "NUMBERS": TASK["numbers"],
    "LARGEST": 3,
    "MIN_SOLUTIONS": TASK["min_ways"],
    "ORDERS": TASK["orders"],
    "HELD_OUT_SHARE": TASK["held_out_share"],
    "HELD_OUT": 1,
    "PROBLEMS": 12,
    "MINIBATCHES": 3,
    "MAX_NEW_TOKENS": 10,
    "LEARNING_RATE": 1e-3,
    "DUAL_CLIP": 1.5,
    "WEIGHT_CAP": 1.2,
    "CAPACITY": 9,
    "MAX_AGE": 2,
}
SETTINGS = {
    "data.task.largest_number": 3,
    "data.task.held_out_problems": 1,
    "data.problems_per_iteration": 12,
    "data.minibatches": 3,
    "data.max_new_tokens": 10,
    "data.engine": "helpers.engines.Recording",
    "data.composer.buffer.capacity": 9,
    "data.composer.buffer.max_age": 2,
    "model.behave_weight.cap": 1.2,
    "model.trust_region": "popo_lightning.objectives.trust_regions.PPOClip",
    "model.trust_region.dual_clip": 1.5,
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 1e-3,
    "model.optimizer.betas": [0.9, 0.98],
    "model.optimizer.weight_decay": 0.0,
    "trainer.max_epochs": ITERATIONS,
    "evaluation.every_n_iterations": 0,
    "checkpoint.every_n_epochs": 1,
    "checkpoint.save_top_k": -1,
}
# One padded response per row, in transformers' own attention: the page's sums, term by term in the same order.
PLAIN_ROWS = {"model.attention": "sdpa", "model.shared_prompts": "false"}

Weights = dict[str, Tensor]
Calls = dict[int, Any]  # the prompts and the responses to each, by seed
Fitted = tuple[list[Weights], Calls]


def page(source: str | None = None, **constants: Any) -> Any:
    """Loads the page as a separate module, with other constants or another source."""
    module = ModuleType("page")
    exec(compile(source or PAGE.read_text(), PAGE, "exec"), module.__dict__)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module


def fit(config: Path, folder: Path, settings: dict[str, Any]) -> Fitted:
    """Returns the weights of `popo fit` after each iteration, and its samples."""
    changes = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    cli = popo("fit", "--config", config, *method("popo"), *changes, "--run.folder", folder)
    checkpoints = sorted((folder / "checkpoints").glob("iteration-*.ckpt"))
    states = [torch.load(path, weights_only=True)["state_dict"] for path in checkpoints]
    assert len(states) == settings["trainer.max_epochs"]
    tied = "model.lm_head.weight"
    found = [{name.removeprefix("model."): state[name] for name in state if name != tied} for state in states]
    return found, cli.datamodule.engine.calls


def weights_by_page(module: Any, policy: Path, generate: Callable[..., Any], iterations: int) -> Iterator[Weights]:
    """Yields the page's weights after each iteration."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    for _ in islice(module.train(model, tokenizer, 1, generate), iterations):
        yield {name: weight.detach().clone() for name, weight in model.named_parameters()}


class OtherPromptsError(Exception):
    """The framework asked other prompts, or used another seed."""


def recorded(calls: Calls) -> Callable[..., Any]:
    """Returns a generator that gives the framework's samples for exactly these prompts and this seed."""

    def generate(model: Any, prompts: list[list[int]], seed: int) -> list[list[tuple[Tensor, Tensor]]]:
        asked, responses = calls.get(seed, (None, None))
        if asked != prompts:
            raise OtherPromptsError
        return [[(each.token_ids, each.behave_logp) for each in group] for group in responses]

    return generate


def token_ids(groups: Any) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in group] for group in groups]


def same(left: Weights, right: Weights) -> bool:
    return all(torch.equal(weight, right[name]) for name, weight in left.items())


def flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def engines(policy: Path) -> tuple[list[list[int]], list[list[Response]]]:
    """Returns prompts of several lengths, and the samples of the transformers engine at seed 5."""
    engine, encoder = TransformersEngine(), PromptEncoder(policy, 24)
    engine.start(EngineContext(policy, torch.device("cpu"), torch.float32, 0, 1, 64))
    asked = [*CountdownSteps(**TASK).train_problems()[:12], *CountdownSteps().train_problems()[:12]]
    prompts = [encoder.encode(problem) for problem in asked]
    assert len({len(prompt.ids) for prompt in prompts}) > 3
    sampled = engine.generate(prompts, 4, Sampling(CONSTANTS["MAX_NEW_TOKENS"]), 5)
    return [prompt.ids.tolist() for prompt in prompts], sampled


@pytest.fixture(scope="module")
def fitted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(config, tmp_path_factory.mktemp("plain"), SETTINGS | PLAIN_ROWS)


# -- the same weights ----------------------------------------------------------------------------------------------


def test_same_weights_bit_for_bit(policy: Path, fitted: Fitted) -> None:
    """Compares after each of eight iterations, given the tokens and log-probs that the framework sampled."""
    expected, calls = fitted
    found = list(weights_by_page(page(**CONSTANTS), policy, recorded(calls), ITERATIONS))
    assert [same(left, right) for left, right in zip(found, expected, strict=True)] == [True] * ITERATIONS


def test_same_tokens_and_weights_by_itself(config: Path, policy: Path, tmp_path: Path) -> None:
    """Runs three iterations with the page's generator, and the framework's packed tokens and shared prompts.

    Gradients differ by about 1e-6 of their largest entries, because the multiplied shapes differ. Adam divides each
    entry by its own size, so an entry of 1e-8, which is only rounding, moves as far as any other. Such entries are few:
    over all weights the difference stays at 1e-4 of the distance moved, and the bound is 1e-3. The difference grows
    with every iteration and would finally change a token. At this learning rate, three iterations are far from that.
    """
    settings = SETTINGS | {"model.optimizer.lr": 2e-4, "trainer.max_epochs": 3}
    expected, calls = fit(config, tmp_path, settings)
    module, sampled = page(**CONSTANTS | {"LEARNING_RATE": 2e-4}), {}

    def generate(model: Any, prompts: list[list[int]], seed: int) -> Any:
        sampled[seed] = module.generate(model, prompts, seed)
        return sampled[seed]

    start = flat(dict(AutoModelForCausalLM.from_pretrained(policy).named_parameters())).detach()
    for left, right in zip(weights_by_page(module, policy, generate, 3), expected, strict=True):
        assert (flat(left) - flat(right)).norm() < 1e-3 * (flat(right) - start).norm()
    assert len(sampled) == 3
    for seed, groups in sampled.items():
        assert [[ids.tolist() for ids, _ in group] for group in groups] == token_ids(calls[seed][1])


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_wrong_rule_is_noticed(old: str, new: str, policy: Path, fitted: Fitted, engines: Any) -> None:
    source = PAGE.read_text()
    assert source.count(old) == 1
    assert not equals_framework(page(source.replace(old, new), **CONSTANTS), policy, fitted, engines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GROUP_SIZE", 3),
        ("PROBLEMS", 11),
        ("MINIBATCHES", 2),
        ("MAX_NEW_TOKENS", 5),
        ("LEARNING_RATE", 1.9e-3),
        ("BETAS", (0.9, 0.99)),
        ("MAX_GRAD_NORM", 0.9),
        ("CLIP_LOW", 0.25),
        ("CLIP_HIGH", 0.2),
        ("DUAL_CLIP", 1.3),
        ("WEIGHT_CAP", 1.25),
        ("CAPACITY", 8),
        ("MAX_AGE", 1),
    ],
)
def test_another_constant_is_noticed(name: str, value: Any, policy: Path, fitted: Fitted, engines: Any) -> None:
    module = page(**CONSTANTS)
    assert getattr(module, name) != value
    setattr(module, name, value)
    assert not equals_framework(module, policy, fitted, engines)


def equals_framework(module: Any, policy: Path, fitted: Fitted, engines: Any) -> bool:
    """Compares the page's samples, and then its weights up to the first iteration that differs."""
    expected, calls = fitted
    prompts, sampled = engines
    drawn = module.generate(AutoModelForCausalLM.from_pretrained(policy), prompts, 5)
    if [[ids.tolist() for ids, _ in group] for group in drawn] != token_ids(sampled):
        return False
    pairs = [pair for group, of in zip(drawn, sampled, strict=True) for pair in zip(group, of, strict=True)]
    if not all(torch.allclose(logp, response.behave_logp, atol=1e-5) for (_, logp), response in pairs):
        return False
    try:
        found = weights_by_page(module, policy, recorded(calls), ITERATIONS)
        return all(same(left, right) for left, right in zip(found, expected, strict=True))
    except OtherPromptsError:
        return False


def test_the_true_page_equals_it(policy: Path, fitted: Fitted, engines: Any) -> None:
    """Otherwise the tests above would notice nothing."""
    assert equals_framework(page(**CONSTANTS), policy, fitted, engines)


# -- the parts that need no run ------------------------------------------------------------------------------------


def test_same_problems() -> None:
    """Compares the problems of the true task and of the small one."""
    for task, module in ((CountdownSteps(), page()), (CountdownSteps(**SMALL_TASK), page(**CONSTANTS))):
        expected = task.train_problems(), task.benchmarks()["countdown"]
        for ours, theirs in zip(module.all_problems(), expected, strict=True):
            answers = [{"numbers": list(each.numbers), "target": each.target} for each in ours]
            assert [each.prompt for each in ours] == [each.prompt for each in theirs]
            assert answers == [each.answer for each in theirs]


def test_same_grades() -> None:
    """Grades right responses, right responses to other problems, and responses with one changed character."""
    module, draw = page(), random.Random(0)
    problem = module.Problem("2,7,5>10:", (2, 5, 7), 10)
    answer = {"numbers": [2, 5, 7], "target": 10}
    right = ["7-2=5;5*2=10", "7-2=5;5+5=10", "5*2=10;10*7=70", "5+7=12;12-2=10", "2*5=10;10/7=1", "7/0=0;0+2=2", ""]
    texts = [
        *right,
        " 5+7=12;12-2=10\n",
        "5+7=12;12-2=10;",
        "5+7=012;12-2=10",
        "5+7=12;12-2=10;10+0=10",
        "٥+7=12;12-2=10",
    ]
    for text in right[1:4]:
        for _ in range(300):
            place = draw.randrange(len(text))
            texts.append(text[:place] + draw.choice("0123456789+-*/=;") + text[place + draw.randrange(2) :])
    grades = [module.grade(problem, text) for text in texts]
    assert grades == [CountdownSteps.verify(answer, text)["score"] for text in texts]
    assert 3 < sum(grades) < len(grades) / 2


def test_constants_are_those_of_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--config", REPOSITORY / "configs" / "task" / "countdown_tiny.yaml"]
    with pytest.raises(SystemExit):
        popo("fit", *task, *method("popo"), "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    data, model, module = config["data"], config["model"], page()
    buffer, optimizer = data["composer"]["init_args"]["buffer"]["init_args"], model["optimizer"]["init_args"]
    region = Objective().trust_region
    found = {
        "PROBLEMS": data["problems_per_iteration"],
        "GROUP_SIZE": data["group_size"],
        "MINIBATCHES": data["minibatches"],
        "MAX_NEW_TOKENS": data["max_new_tokens"],
        "LEARNING_RATE": optimizer["lr"],
        "BETAS": tuple(optimizer["betas"]),
        "MAX_GRAD_NORM": model["max_grad_norm"],
        "CLIP_LOW": region.clip_low,
        "CLIP_HIGH": region.clip_high,
        "DUAL_CLIP": region.dual_clip,
        "WEIGHT_CAP": model["behave_weight"]["init_args"]["cap"],
        "CAPACITY": buffer["capacity"] or data["problems_per_iteration"],
        "MAX_AGE": buffer["max_age"],
    }
    assert {name: getattr(module, name) for name in found} == found
    # settings for which the page has no constant
    assert (optimizer["weight_decay"], data["temperature"], data["ppo_epochs"], data["async_level"]) == (0, 1, 1, 0)
    assert (data["effective_key"], model["reward_key"], data["overlong"]) == (None, "score", None)


# -- a page to read and to run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PAGE.parent.glob("*.py")), ids=lambda path: path.name)
def test_stands_alone_on_a_page(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    others = imported - sys.stdlib_module_names
    assert others <= {"torch", "transformers", "tokenizers", "numpy", "popo_in_one_file", "starting_policy"}
    assert len(path.read_text().splitlines()) <= 300


def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """main() builds the policy if it does not exist, trains it, and prints the result."""
    monkeypatch.syspath_prepend(str(PAGE.parent))
    import popo_in_one_file
    import starting_policy

    for name, value in {"BATCHES": 40, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(starting_policy, name, value)
    for name, value in {"PROBLEMS": 4, "HELD_OUT": 3}.items():
        monkeypatch.setattr(popo_in_one_file, name, value)
    monkeypatch.setattr(sys, "argv", ["page", "--model", str(tmp_path / "policy"), "--iterations", "2", "--seed", "3"])
    popo_in_one_file.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [line[1] for line in lines if line[0] == "after"] == ["0", "2"]
    header = lines.index(["reward", "effective", "replayed", "age", "seconds"])
    assert [line[0] for line in lines[header + 1 : header + 3]] == ["1", "2"]
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([2, 12, 1], skip_special_tokens=True) == "0+"


def test_examples_to_start_from_are_true_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAGE.parent))
    import popo_in_one_file
    import starting_policy

    grades = []
    train = {problem.prompt: problem for problem in popo_in_one_file.all_problems()[0]}
    for prompt, response in islice(starting_policy.examples(list(train.values())), 400):
        problem = train[prompt]
        parts = CountdownSteps.verify({"numbers": list(problem.numbers), "target": problem.target}, response)
        assert parts["format"] == 1
        grades.append(parts["score"])
    assert 0.2 < sum(grades) / len(grades) < 0.35


@pytest.mark.slow
def test_the_true_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped policy of the task, three iterations give the weights of `popo fit`, and the page learns."""
    monkeypatch.syspath_prepend(str(PAGE.parent))
    import popo_in_one_file

    policy = CountdownWarmStart().folder()
    config = REPOSITORY / "configs" / "task" / "countdown_tiny.yaml"
    settings = {name: value for name, value in SETTINGS.items() if name.startswith("checkpoint")}
    settings |= {"trainer.max_epochs": 3, "evaluation.every_n_iterations": 0, "evaluation.limit": 10}
    settings |= {"model.warm_start": "null", "model.path": policy, "data.engine": "helpers.engines.Recording"}
    expected, _ = fit(config, tmp_path / "run", settings)
    start = flat(dict(AutoModelForCausalLM.from_pretrained(policy).named_parameters())).detach()
    found = weights_by_page(popo_in_one_file, policy, popo_in_one_file.generate, 3)
    for left, right in zip(found, expected, strict=True):
        assert (flat(left) - flat(right)).norm() < 1e-3 * (flat(right) - start).norm()

    monkeypatch.setattr(sys, "argv", ["page", "--model", str(policy), "--iterations", "50"])
    popo_in_one_file.main()
    right = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("after")]
    assert len(right) == 2 and right[0] + 0.03 < right[1]
