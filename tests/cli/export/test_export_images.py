"""Vision-language policies are exported with their processor, sampled with a picture, and loaded from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.exports import (
    PLAIN_IMAGES,
    as_shards,
    exported,
    greedy_rows,
    newest,
    policy_weights,
    python,
    question_of,
    refused,
    said_by,
    same_bits,
    tensors,
)
from helpers.tiny_models import method, popo

from popo_lightning.core.problems import Problem
from popo_lightning.policy import PolicyModule
from popo_lightning.toys.drawn_geometry import DrawnGeometry
from popo_lightning.toys.geometry_policy import GeometryWarmStart

LIMIT = 12
PIXELS = [28 * 28, 28 * 28 * 12]
TASK: dict[str, Any] = {"held_out_problems": 7, "problems_per_kind": 4}
POLICY: dict[str, Any] = {
    **{"examples": 640, "batch_size": 16, "hidden_size": 64, "layers": 2, "intermediate_size": 64},
    **{"vision_hidden_size": 32, "vision_layers": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of two iterations, whose policy was built for it."""
    folder = tmp_path_factory.mktemp("geometry")
    config = {
        "run": {"task": "geometry", "folder": str(folder / "run")},
        "model": {
            "warm_start": {"class_path": "GeometryWarmStart", "init_args": POLICY},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}},
        },
        "data": {
            "task": {"class_path": "DrawnGeometry", "init_args": TASK},
            "engine": "TransformersEngine",
            **{"problems_per_iteration": 4, "group_size": 2, "minibatches": 1, "max_prompt_tokens": 32},
            **{"max_new_tokens": LIMIT, "image_pixels": PIXELS},
        },
        "evaluation": {"samples": 0},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    popo("fit", "--config", folder / "config.yaml", *method("any_group"))
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Problem, str, str]]:
    """Returns (problem, picture file, answer) of the last evaluation, whose rows have the problem's id instead."""
    folder = tmp_path_factory.mktemp("pictures")
    problems = {problem.id: problem for problem in DrawnGeometry(**TASK).benchmarks()["geometry"]}
    found = []
    for number, row in enumerate(greedy_rows(run)):
        problem = problems[row["problem"]]
        file = folder / f"{number}.png"
        assert isinstance(problem.images[0], bytes)
        file.write_bytes(problem.images[0])
        found.append((problem, str(file), row["response"]))
    return found


def assert_same(out: Path, run: Path, dtype: torch.dtype = torch.float32) -> None:
    """The folder's tensors have the base's names, and the policy's bits once transformers has renamed them."""
    from transformers import AutoModelForImageTextToText

    assert tensors(out).keys() == tensors(GeometryWarmStart(**POLICY).folder()).keys()
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    kept = policy_weights(newest(run))
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach(), kept.pop(name).to(dtype)), name
    assert kept.keys() <= {"lm_head.weight"}


@pytest.mark.slow
def test_bits_processor_and_answers(run: Path, pictures: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(run, out)
    assert_same(out, run)
    assert (out / "chat_template.jinja").exists()
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()
    asked = tmp_path / "pictures.json"
    asked.write_text(json.dumps([[question_of(problem), file] for problem, file, _ in pictures]))
    output = python(PLAIN_IMAGES, out, LIMIT, asked)
    answers = json.loads(output[output.index("ANSWERS ") + 8 :])
    assert answers == [answer for _, _, answer in pictures] and len(answers) == 7 and len(set(answers)) > 1


def test_the_runs_limits_of_an_image_are_the_processors(run: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    exported(run, tmp_path / "out")
    size = AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size
    assert [size["shortest_edge"], size["longest_edge"]] == PIXELS
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert len(generation["suppress_tokens"]) == 4, "a response has no image tokens"


def test_shards_give_the_same_folder(run: Path, tmp_path: Path) -> None:
    exported(as_shards(newest(run), tmp_path / "a.ckpt"), tmp_path / "out", "--dtype", "bfloat16")
    assert_same(tmp_path / "out", run, torch.bfloat16)


def test_a_picture_is_asked_about(run: Path, pictures: list[Any], tmp_path: Path) -> None:
    for problem, file, answer in pictures[:3]:
        asked = [question_of(problem), "--image", file, "--temperature", "0", "--gold", str(problem.answer)]
        code, out, err = said_by("sample", run, *asked)
        grade = DrawnGeometry.verify(problem.answer, answer)["score"]
        assert code == 0, err
        assert out.startswith(f"-- answer 1 of 1: score {grade:g}, ") and out.splitlines()[1:-1] == answer.split("\n")
    (tmp_path / "no picture.png").write_text("hello")
    assert "cannot be read" in refused("sample", run, "x?", "--image", tmp_path / "no picture.png")
    assert "--image gives 1" in refused("sample", run, "<image><image>x?", "--image", pictures[0][1])


def test_it_loads_from_a_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also loads without the folder that was built for the run."""
    whole = PolicyModule.load_from_checkpoint(run)
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "empty"))
    bare = PolicyModule.load_from_checkpoint(newest(run))
    kept = policy_weights(newest(run))
    for module in (whole, bare):
        assert all(same_bits(weight.detach(), kept[name]) for name, weight in module.model.named_parameters())
        assert len(module.forbidden_token_ids) == 4
    ids = torch.tensor([[10, 11, 12]])
    assert torch.equal(whole.model(ids).logits, bare.model(ids).logits)
