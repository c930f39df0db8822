"""The paper's configurations compose with a task and any method, and say what docs/paper_settings.md says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tiny_models import REPOSITORY, method, popo

TASKS = {"math_1p5b": "math", "math_7b": "math", "countdown_3b": "countdown", "geometry_vl3b": "geometry"}
BATCH = {  # problems, minibatches, prompt and response tokens, iterations
    "math_1p5b": (256, 2, 1024, 8192, 140),
    "math_7b": (256, 2, 1024, 8192, 140),
    "countdown_3b": (256, 4, 256, 1024, 100),
    "geometry_vl3b": (512, 2, 1024, 1024, 120),
}


def composed(name: str, rule: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    configs = REPOSITORY / "configs"
    task, paper = configs / "task" / f"{TASKS[name]}.yaml", configs / "paper" / f"{name}.yaml"
    with pytest.raises(SystemExit) as ended:
        popo("fit", "--config", task, *method(rule), "--config", paper, "--print_config")
    assert ended.value.code == 0
    read: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return read


@pytest.mark.parametrize("name", TASKS)
def test_paper_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(name, "popo", capsys)
    data, model = config["data"], config["model"]
    found = tuple(data[key] for key in ("problems_per_iteration", "minibatches", "max_prompt_tokens", "max_new_tokens"))
    assert (*found, config["trainer"]["max_epochs"]) == BATCH[name]
    assert (data["group_size"], data["temperature"], data["overlong"], data["effective_by"]) == (8, 1.0, None, "score")
    assert data["composer"]["init_args"]["buffer"]["init_args"] == {"capacity": None, "max_age": 8}
    objective = model["objective"]["init_args"]
    assert objective["behave_weight"]["init_args"]["cap"] == 5.0
    assert objective["trust_region"]["init_args"] == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    coefficients = [term["init_args"]["coefficient"] for term in objective["regularizers"]]
    assert coefficients == ([0.001, 0.01] if name == "geometry_vl3b" else [0.001])
    assert model["optimizer"]["init_args"]["lr"] == 1e-6 and model["optimizer"]["init_args"]["weight_decay"] == 0.1
    assert (model["dtype"], config["trainer"]["precision"], model["max_grad_norm"]) == ("float32", "bf16-mixed", 1.0)
    assert (config["evaluation"]["temperature"], config["evaluation"]["samples"]) == (0.6, 16)


@pytest.mark.parametrize("name", TASKS)
def test_a_baseline_at_the_papers_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert composed(name, "grpo", capsys)["data"]["composer"]["class_path"].endswith("OnPolicy")
