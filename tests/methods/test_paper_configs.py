"""The paper's configurations compose with a task and any method, and agree with docs/paper_settings.md."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import method, popo

TASKS = {"math_1p5b": "math", "math_7b": "math", "countdown_3b": "countdown", "geometry_vl3b": "geometry"}
BATCH = {  # problems, minibatches, prompt and response tokens, iterations
    "math_1p5b": (256, 2, 1024, 8192, 360),
    "math_7b": (256, 2, 1024, 8192, 140),
    "countdown_3b": (256, 4, 256, 1024, 100),
    "geometry_vl3b": (512, 2, 1024, 1024, 120),
}
PAPER = REPOSITORY / "configs" / "paper"
CARD, GRAPHS = 80 * 2**30 * 0.99, 3e9  # bytes of an 80 GB card, and of CUDA's context and graphs
SIZES = {  # parameters of the model, and of its largest matrix
    "math_1p5b": (1.777e9, 151_936 * 1536),
    "math_7b": (7.616e9, 152_064 * 3584),
    "countdown_3b": (3.086e9, 151_936 * 2048),
    "geometry_vl3b": (3.755e9, 151_936 * 2048),
}
SHAPES = {"math_1p5b": (1536, 28), "math_7b": (3584, 28), "countdown_3b": (2048, 36), "geometry_vl3b": (2048, 36)}


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
    assert (data["group_size"], data["temperature"], data["overlong"], data["effective_key"]) == (8, 1.0, None, None)
    assert data["composer"]["init_args"]["buffer"]["init_args"] == {
        "capacity": None,
        "max_age": 8,
        "max_uses": None,
    }
    assert model["behave_weight"]["init_args"]["cap"] == 2.0
    assert model["trust_region"]["init_args"] == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    coefficients = [term["init_args"]["coefficient"] for term in model["regularizers"]]
    assert coefficients == ([0.001, 0.01] if name == "geometry_vl3b" else [0.001])
    assert model["optimizer"]["init_args"]["lr"] == 1e-6 and model["optimizer"]["init_args"]["weight_decay"] == 0.1
    assert (model["dtype"], config["trainer"]["precision"], model["max_grad_norm"]) == ("float32", "bf16-mixed", 1.0)
    assert (config["evaluation"]["temperature"], config["evaluation"]["samples"]) == (0.6, 16)


@pytest.mark.parametrize("name", TASKS)
def test_split_over_the_gpus(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(name, "popo", capsys)
    strategy, engine = config["trainer"]["strategy"], config["data"]["engine"]
    assert strategy["class_path"].endswith("ModelParallelStrategy")
    assert strategy["init_args"]["tensor_parallel_size"] == 1
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (8, 1)
    assert engine["init_args"]["sleep_level"] == 2  # the next sync brings weights, so a copy of them is wasted
    assert "enforce_eager" not in yaml.safe_load((PAPER / f"{name}.yaml").read_text())["data"]["engine"]["init_args"]


@pytest.mark.parametrize("name", TASKS)
def test_fits_eight_gpus_of_80_gb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The memory holds vLLM's share, the split state, and the largest matrix, gathered for a sync, in three types."""
    config = composed(name, "popo", capsys)
    parameters, largest = SIZES[name]
    reference = 4 if name == "geometry_vl3b" else 0
    state = parameters * (16 + reference) / 8
    sampling = state + config["data"]["engine"]["init_args"]["gpu_memory_utilization"] * CARD + largest * (4 + 2 + 2)
    tokens, width, layers = config["model"]["micro_batch_tokens"], *SHAPES[name]
    training = state + layers * tokens * width * 2 + tokens * width * 60 + 2**28 * 12
    assert config["model"]["gradient_checkpointing"]
    assert sampling + GRAPHS < CARD and training + GRAPHS < CARD
    comment = (PAPER / f"{name}.yaml").read_text().replace("\n#", "")
    assert f"{state / 1e9:.1f} GB per GPU" in comment


def test_the_geometry_number_is_that_of_the_test_split(capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks = composed("geometry_vl3b", "popo", capsys)["data"]["task"]["init_args"]["benchmarks"]
    assert {name: source["split"] for name, source in benchmarks.items()} == {"geometry3k_test": "test"}


@pytest.mark.parametrize("name", TASKS)
def test_a_baseline_at_the_papers_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert composed(name, "grpo", capsys)["data"]["composer"]["class_path"].endswith("OnPolicy")


@pytest.mark.parametrize("rule", ["gspo", "cispo", "opmd", "m2po", "popo_masked", "grpo"])
def test_a_method_keeps_its_objective(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's entropy bonus is added."""
    task = REPOSITORY / "configs" / "task" / "math.yaml"
    with pytest.raises(SystemExit):
        popo("fit", "--config", task, *method(rule), "--print_config")
    alone = yaml.safe_load(capsys.readouterr().out)["model"]
    found = composed("math_1p5b", rule, capsys)["model"]
    for part in ("behave_weight", "trust_region", "aggregation"):
        assert found[part] == alone[part]
    terms = [term["class_path"] for term in found["regularizers"]]
    own = [term["class_path"] for term in alone["regularizers"] or []]
    assert terms == [*own, "popo_lightning.objectives.regularizers.EntropyBonus"]
