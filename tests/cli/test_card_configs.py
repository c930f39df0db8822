"""The presets for one card compose with task and method, and by their arithmetic the run fits the card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import method, popo

CARDS = sorted((REPOSITORY / "configs" / "card").glob("*.yaml"))
BYTES = {"24gb": 24.15e9, "80gb": 85.0e9}  # L4 or A10; A100 or H100
MODELS = {  # parameters, layers, width, inner width
    "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, 24, 896, 4864),
    "Qwen/Qwen2.5-1.5B-Instruct": (1_543_714_304, 28, 1536, 8960),
}
CONTEXT = 1.5e9  # CUDA's context and graphs
CHUNK = 2**28 * 12  # log-probs of one chunk, with what their backward pass needs


def composed(card: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    if "torchao" in card.read_text():
        pytest.importorskip("torchao.optim", reason="torchao, an optional dependency, is not installed")
    task = REPOSITORY / "configs" / "task" / "gsm8k.yaml"
    with pytest.raises(SystemExit) as ended:
        popo("fit", "--config", task, *method(rule), "--config", card, "--print_config")
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    read: dict[str, Any] = yaml.safe_load(captured.out)
    return read


def test_there_are_four() -> None:
    assert [card.stem for card in CARDS] == ["24gb_0p5b", "24gb_1p5b", "80gb_0p5b", "80gb_1p5b"]


@pytest.mark.parametrize("rule", ["popo", "grpo"])
@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_composes(card: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(card, rule, capsys)
    assert (config["run"]["method"], config["trainer"]["devices"]) == (rule, 1)
    assert config["data"]["task"]["init_args"]["benchmarks"].keys() == {"gsm8k"}


def needs(config: dict[str, Any], card: float) -> tuple[float, float]:
    """Returns a rough number of bytes in use while the policy trains and while it samples."""
    model, share = config["model"], config["data"]["engine"]["init_args"]["gpu_memory_utilization"]
    parameters, layers, width, inner = MODELS[model["path"]]
    rounded = model.get("dtype") == "bfloat16"
    state = parameters * (8 if rounded else 16)
    copies = 0 if rounded else 2 * parameters
    of_layer = 30 * width + 8 * inner  # for one token
    each = (2 if rounded else 4) * width * layers + of_layer if model["gradient_checkpointing"] else of_layer * layers
    return state + copies + model["micro_batch_tokens"] * each + CHUNK, state + share * card


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_fits_its_card(card: Path) -> None:
    config = yaml.safe_load(card.read_text())
    size = BYTES[card.stem.partition("_")[0]]
    training, sampling = needs(config, size)
    assert training + CONTEXT < size and sampling + CONTEXT < size
    written = [float(found) for found in re.findall(r"in all (\d+\.\d)", card.read_text())]
    assert written == pytest.approx([training / 1e9, sampling / 1e9], rel=0.05)
    engine = config["data"]["engine"]["init_args"]
    assert (
        engine["gpu_memory_utilization"] * size > 1.5 * 2 * MODELS[config["model"]["path"]][0] + 3e9
    )  # the weights and a cache fit


def test_in_float32_the_larger_model_does_not_fit_the_smaller_card() -> None:
    config = yaml.safe_load((REPOSITORY / "configs" / "card" / "80gb_1p5b.yaml").read_text())
    assert needs(config, BYTES["24gb"])[0] > BYTES["24gb"]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_no_bfloat16_weights_without_stochastic_rounding(card: Path) -> None:
    model = yaml.safe_load(card.read_text())["model"]
    rounds = model["optimizer"]["init_args"].get("bf16_stochastic_round", False)
    assert rounds == (model.get("dtype", "float32") == "bfloat16")
