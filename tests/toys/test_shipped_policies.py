"""The package contains the policies of the embedded tasks. A newly built one is as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.places import POLICIES, REPOSITORY
from helpers.tiny_models import effective_share, tiny_policy

from popo_lightning.core import warm_start
from popo_lightning.core.warm_start import SHIPPED, WarmStart
from popo_lightning.engines.base import EngineContext, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.loading import load_model
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.toys import countdown_policy, geometry_policy
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import CountdownWarmStart
from popo_lightning.toys.geometry_policy import GeometryWarmStart

RECIPES = [CountdownWarmStart, GeometryWarmStart]
PROBLEMS, RESPONSES = 200, 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_recipe_is_shipped_and_loads(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "build", lambda *_: pytest.fail("built although it is shipped"))
    folder = recipe().folder()
    assert folder.parent == SHIPPED
    assert sum(p.numel() for p in load_model(folder, torch.float32).parameters()) > 4e5
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pkl")), "safetensors only"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


def test_nothing_else_is_shipped() -> None:
    assert {folder.name for folder in SHIPPED.iterdir()} == {recipe().address for recipe in RECIPES}


@pytest.mark.parametrize(
    ("task", "recipe"), [("countdown_tiny", CountdownWarmStart), ("geometry_tiny", GeometryWarmStart)]
)
def test_the_configurations_ask_for_what_is_shipped(task: str, recipe: type[WarmStart]) -> None:
    model = yaml.safe_load((REPOSITORY / "configs" / "task" / f"{task}.yaml").read_text())["model"]
    assert recipe(**model["warm_start"].get("init_args", {})).folder().parent == SHIPPED


def test_another_recipe_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path))
    monkeypatch.setattr(CountdownWarmStart, "build", lambda self, folder: (folder / "here").write_text(""))
    assert CountdownWarmStart(seed=1).folder().parent == tmp_path


def quality(folder: Path) -> tuple[float, float]:
    """Returns the share of right responses at temperature 1, and of groups with different rewards."""
    task, encoder, engine = CountdownSteps(), PromptEncoder(folder, 24), TransformersEngine()
    engine.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 48))
    asked = task.benchmarks()["countdown"][:PROBLEMS]
    sampled = engine.generate([encoder.encode(p) for p in asked], RESPONSES, Sampling(24), seed=0)
    grades = [[task.verify(p.answer, r.text)["acc"] for r in rs] for p, rs in zip(asked, sampled, strict=True)]
    right = sum(map(sum, grades)) / (PROBLEMS * RESPONSES)
    return right, sum(len(set(group)) > 1 for group in grades) / PROBLEMS


# Losses of the default recipes at the steps 0, 10 and 20, from the code that built the shipped policies.
LOSSES = {CountdownWarmStart: [3.194013, 2.818808, 2.613919], GeometryWarmStart: [6.032486, 5.330570, 4.094786]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_still_trains_the_same(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the default recipe's thousand steps and more. test_one_built_anew_is_as_good takes all of them."""
    losses: list[float] = []
    train = countdown_policy.train_supervised

    def recorded(loss: Any, *settings: Any) -> None:
        def kept() -> Any:
            found = loss()
            losses.append(found.item())
            return found

        train(kept, *settings)

    monkeypatch.setattr(countdown_policy, "track", lambda steps, description: steps[:21])
    for module in (countdown_policy, geometry_policy):
        monkeypatch.setattr(module, "train_supervised", recorded)
    recipe().build(tmp_path)
    assert losses[::10] == pytest.approx(LOSSES[recipe], rel=1e-3)  # processors differ by less than 1e-5


@pytest.mark.nightly
def test_one_built_anew_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights differ between processors. The quality must agree within four standard errors of 200 problems."""
    shipped = quality(CountdownWarmStart().folder())
    monkeypatch.setattr(warm_start, "SHIPPED", tmp_path / "none")
    monkeypatch.setenv("POPO_CACHE", str(tmp_path))
    built = quality(CountdownWarmStart().folder())
    assert 0.05 < shipped[0] < 0.2 and 0.2 < shipped[1] < 0.6
    assert built[0] == pytest.approx(shipped[0], abs=0.06) and built[1] == pytest.approx(shipped[1], abs=0.14)


def test_the_tests_policy_is_right_now_and_then() -> None:
    """Otherwise tests of replay would test nothing."""
    assert 0.3 < effective_share(POLICIES / tiny_policy().address) < 0.9


@pytest.mark.slow
def test_the_tests_policy_built_anew_is_as_good(tmp_path: Path) -> None:
    tiny_policy().build(tmp_path)
    assert 0.3 < effective_share(tmp_path) < 0.9
