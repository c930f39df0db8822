"""LoRA on two ranks, with a whole model (DDP) or part of one (FSDP2) on each, trains as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nodes import fsdp2, one_node
from helpers.processes import on_two_ranks, rows_of, train, whole_tensors
from helpers.tiny_models import method, metrics, random_model

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.model.lora import Lora, adapters
from popo_lightning.objectives.regularizers import KL
from popo_lightning.policy import PolicyModule

STEPS = 2


def trained(folder: Path, strategy: str, minibatches: list[list[Minibatch]]) -> dict[str, Any]:
    """Returns adapters, weights for an engine and log-probs of the reference after two steps."""
    torch.manual_seed(1)
    module = PolicyModule(
        path=str(folder),
        lora=Lora(r=3, alpha=12),
        regularizers=[KL(0.5)],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        micro_batch_tokens=40,
    )
    module, _ = train(module, strategy, minibatches)
    given = {name: weight.clone() for name, weight in module.named_weights()}
    state = module.state_dict()
    return {
        "adapters": whole_tensors(adapters(module.model).items()),
        "given": given,
        "saved": sorted(state),
        "frozen_gradients": any(p.grad is not None for p in module.model.parameters() if not p.requires_grad),
        "bits": module.trained_bits(),
    }


def minibatches() -> list[list[Minibatch]]:
    return [[rows_of(10 * step + rank, (3, 5)) for rank in range(2)] for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(tmp_path: Path, strategy: str) -> None:
    folder = random_model("llama-tied", tmp_path / "model")
    one, other = on_two_ranks(trained, tmp_path / strategy, folder, strategy, minibatches())
    joined = [[Minibatch([*a.groups, *b.groups], a.version, a.index)] for a, b in minibatches()]
    alone = trained(folder, "one", joined)
    assert one["saved"] == alone["saved"] and len(one["saved"]) == 28 and not one["frozen_gradients"]
    assert one["bits"] == other["bits"]
    for part in ("adapters", "given"):
        assert one[part].keys() == alone[part].keys()
        for name, weight in alone[part].items():
            torch.testing.assert_close(one[part][name], weight, atol=2e-5, rtol=1e-4)
            assert torch.equal(one[part][name], other[part][name]), "ranks differ"
    moved = [
        name for name in alone["adapters"] if "lora_B" in name and float(alone["adapters"][name].abs().max()) > 1e-4
    ]
    assert len(moved) == 14


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_a_sharded_run_resumes(config: Path, tmp_path: Path, whole: bool) -> None:
    """From shards and from a whole file it equals a run that never stopped on as many ranks."""
    same = ["--data.engine", "helpers.tiny_models.EngineByProblem", "--data.problems_per_iteration", "8"]
    lora = ["--model.lora", "{r: 3, alpha: 12}", "--data.minibatches", "1", "--checkpoint.every_n_epochs", "1"]
    command = ["fit", "--config", config, *method("popo"), *same, *lora, "--checkpoint.save_top_k", "-1"]

    def run(folder: str, epochs: int, *more: str) -> list[dict[str, float]]:
        place = ["--run.folder", tmp_path / folder, "--trainer.max_epochs", str(epochs)]
        one_node(2, *command, *place, *more, *fsdp2(2, whole), seconds=200)
        return [row for row in metrics(tmp_path / folder) if "train/loss" in row]

    expected = run("one", 3)
    run("two", 2)
    assert run("two", 3, "--run.resume", "true") == expected
    assert len(expected) == 3 and any(row["train/grad_norm"] > 0 for row in expected)
