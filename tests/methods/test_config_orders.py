"""Files before or after a method's file do not change the method's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import REPOSITORY

from popo_lightning.cli.compare.checking import ParsedOnly

CONFIGS = REPOSITORY / "configs"
METHODS = sorted(CONFIGS.glob("method/*.yaml"))
PAPERS = sorted(CONFIGS.glob("paper/*.yaml"))
OTHERS = [
    file for room in ("paper", "model", "card", "scale", "task") for file in sorted(CONFIGS.glob(f"{room}/*.yaml"))
]
ADDED = {"model.regularizers+"}  # appended, so that both files' terms are kept


def settings(content: Any, above: str = "") -> Iterator[str]:
    """Yields the paths of all settings of a file that are not groups of others."""
    if not isinstance(content, dict):
        yield above
        return
    for name, value in content.items():
        yield from settings(value, f"{above}.{name}" if above else name)


@cache
def settings_of(file: Path) -> set[str]:
    return set(settings(yaml.safe_load(file.read_text())))


def overlap(one: str, other: str) -> bool:
    """Returns whether two paths are the same setting, or one contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def named(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.mark.parametrize("method", METHODS, ids=lambda file: file.stem)
def test_no_other_file_sets_what_a_method_sets(method: Path) -> None:
    own = settings_of(method)
    assert "model.regularizers" not in own, "write regularizers+, or those of a paper's file are lost"
    for other in OTHERS:
        theirs = settings_of(other)
        both = {name for name in own if any(overlap(name, their) for their in theirs)}
        assert both <= ADDED, f"{named(method)} and {named(other)} both set {both}"


def test_a_part_of_a_setting_overlaps_with_it() -> None:
    assert overlap("data.engine", "data.engine.init_args.size") and overlap("data.engine.kind", "data.engine")
    assert not overlap("data.engine", "data.engines") and not overlap("data.engine", "model.engine")


def composed(*files: Path) -> dict[str, Any]:
    arguments = [word for file in files for word in ("--config", str(file))]
    cli = ParsedOnly(["fit", *arguments, "--run.folder", "anywhere"])
    plain = cli._parser("fit").dump(cli.config["fit"], skip_none=False, format="json", skip_validation=True)
    found: dict[str, Any] = json.loads(plain)
    (found["model"]["regularizers"] or []).sort(key=lambda term: str(term["class_path"]))
    return found


def task_of(paper: Path) -> Path:
    name = {"math_1p5b": "math", "math_7b": "math", "countdown_3b": "countdown", "geometry_vl3b": "geometry"}[
        paper.stem
    ]
    return CONFIGS / "task" / f"{name}.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS, ids=lambda file: file.stem)
def test_methods_with_paper_files_as_they_are_parsed(paper: Path) -> None:
    """Tests all methods with one file, and methods that append with all files.

    Other methods share no setting with the files, as the test above shows.
    """
    task = task_of(paper)
    append = [method for method in METHODS if ADDED & settings_of(method)]
    for method in METHODS if paper is PAPERS[0] else append:
        alone, before = composed(task, method), composed(task, method, paper)
        if method in append:
            assert before == composed(task, paper, method), method.stem
        for slot in ("advantage", "behave_weight", "trust_region", "aggregation", "critic"):
            assert before["model"][slot] == alone["model"][slot], (method.stem, slot)
        assert before["data"]["composer"] == alone["data"]["composer"] and before["proximal"] == alone["proximal"]
        own = [term["class_path"] for term in alone["model"]["regularizers"] or []]
        terms = [term["class_path"] for term in before["model"]["regularizers"]]
        assert set(own) <= set(terms) and "popo_lightning.objectives.regularizers.EntropyBonus" in terms
