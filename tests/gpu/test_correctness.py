"""Log-probs and gradients on the device equal the CPU's. Packed prompts give the same as plain rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.gpu_steps import Step, one_step, relative, some_groups
from helpers.tiny_models import random_model

from popo_lightning.model.loading import load_model

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
# Norm of the differences relative to the norm. bfloat16 keeps 8 bits, and rounding errors of the layers add up.
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 5e-2}
MINIBATCH = some_groups((6, 30, 90), (3, 40, 1, 17))


@pytest.fixture(scope="module", params=["qwen2", "llama-untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("model"))


def assert_alike(found: Step, expected: Step, tolerance: float) -> None:
    assert relative(torch.cat(found.logp), torch.cat(expected.logp)) < tolerance
    assert found.gradients.keys() == expected.gradients.keys()
    flat = [torch.cat([step.gradients[name].flatten() for name in expected.gradients]) for step in (found, expected)]
    assert flat[1].norm() > 1e-3, "without a gradient nothing is compared"
    assert relative(flat[0], flat[1]) < tolerance
    assert found.outputs["mean_loss"] == pytest.approx(expected.outputs["mean_loss"], abs=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_device_computes_what_the_cpu_computes(folder: Path, device: torch.device, precision: str) -> None:
    expected = one_step(folder, CPU, MINIBATCH)
    assert_alike(one_step(folder, device, MINIBATCH, precision), expected, TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_packed_prompts_give_what_plain_rows_give(folder: Path, device: torch.device, precision: str) -> None:
    """With long prompts and short responses, several responses follow one copy of a prompt."""
    minibatch = some_groups((90, 60), (3, 9, 5, 5))
    plain = one_step(folder, device, minibatch, precision, shared_prompts=False)
    assert_alike(one_step(folder, device, minibatch, precision), plain, TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recomputation_changes_no_number(folder: Path, device: torch.device, precision: str) -> None:
    kept = one_step(folder, device, MINIBATCH, precision)
    recomputed = one_step(folder, device, MINIBATCH, precision, gradient_checkpointing=True)
    assert_alike(recomputed, kept, 1e-5 if precision == "32-true" else TOLERANCE[precision])


def test_small_micro_batches_change_no_number(folder: Path, device: torch.device) -> None:
    whole = one_step(folder, device, MINIBATCH)
    assert_alike(one_step(folder, device, MINIBATCH, micro_batch_tokens=150), whole, TOLERANCE["32-true"])


def test_a_model_loads_under_the_devices_context(folder: Path, device: torch.device) -> None:
    """Lightning enters this context around configure_model, and the strategy moves the model afterwards."""
    with device:
        model = load_model(folder, torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
