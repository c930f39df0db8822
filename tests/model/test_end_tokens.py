"""Both engines end a response at the same tokens, wherever these are configured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_model
from transformers import GenerationConfig

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.problems import Problem
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling, end_token_ids
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.prompts import Prompt
from popo_lightning.rollout.report import RolloutReport, rollout_metrics

END, OTHER, THIRD = 1, 9, 14  # the tokenizer's end, and the ends in generation configs
LIMIT = 24
CASES: dict[str, tuple[Any, set[int]]] = {  # eos_token_id of the generation config, and where responses end
    "two": ([END, OTHER], {END, OTHER}),
    "another": (OTHER, {END, OTHER}),
    "two others": ([OTHER, THIRD], {END, OTHER, THIRD}),
    "none": (None, {END}),
}


def folder_with(ends: Any, folder: Path) -> Path:
    random_model("llama-tied", folder)
    path = folder / "generation_config.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "eos_token_id"}
    path.write_text(json.dumps(content | ({} if ends is None else {"eos_token_id": ends})))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ends_of_a_folder(case: str, tmp_path: Path) -> None:
    given, expected = CASES[case]
    tokenizer = SimpleNamespace(eos_token_id=END)
    assert end_token_ids(folder_with(given, tmp_path), tokenizer) == sorted(expected)


def test_without_a_generation_config_the_models_own_counts(tmp_path: Path) -> None:
    folder = random_model("llama-tied", tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [OTHER, THIRD]}))
    assert end_token_ids(folder, SimpleNamespace(eos_token_id=END)) == [END, OTHER, THIRD]
    assert end_token_ids(folder, SimpleNamespace(eos_token_id=None)) == [OTHER, THIRD]


def test_an_end_that_is_no_token_is_named(tmp_path: Path) -> None:
    folder = folder_with(None, tmp_path)
    GenerationConfig(eos_token_id=-1).save_pretrained(folder)
    with pytest.raises(SettingError, match="eos_token_id has -1, which is no token"):
        end_token_ids(folder, SimpleNamespace(eos_token_id=END))


ENGINES = [TransformersEngine, pytest.param(VLLMEngine, marks=pytest.mark.vllm)]


@pytest.fixture(params=ENGINES, ids=lambda kind: kind.__name__)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RolloutEngine]:
    """Yields an engine whose model has two ends in its generation config that are not its tokenizer's."""
    folder = folder_with([OTHER, THIRD], tmp_path)
    made = request.param()
    made.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 64))
    yield made
    made.stop()


@pytest.mark.slow
def test_engines_end_at_all_of_them(engine: RolloutEngine) -> None:
    prompts = [Prompt(torch.tensor([token, 5])) for token in range(2, 12)]
    sampled = engine.generate(prompts, 16, Sampling(LIMIT), seed=3)
    responses = [response for of_prompt in sampled for response in of_prompt]
    ends, seen = {END, OTHER, THIRD}, set()
    for response in responses:
        *before, last = response.token_ids.tolist()
        assert ends.isdisjoint(before), "a response continues after its end"
        assert (response.finish_reason == "stop") == (last in ends)
        assert response.finish_reason == "stop" or len(before) == LIMIT - 1
        seen.add(last if response.finish_reason == "stop" else None)
    assert seen == ends | {None}, "not every end is met, so nothing is known of it"
    for response in responses:
        response.parts.update(score=0.0, acc=0.0)
    report = RolloutReport(0, "score")
    report.sampled([Group(0, Problem("0", "", None), prompts[0].ids, responses, 0)])
    truncated = sum(ends.isdisjoint(response.token_ids.tolist()) for response in responses)
    assert rollout_metrics(report.counts())["rollout/truncated_frac"] == truncated / len(responses)
