"""Pairs of gold and answer kept outside the repository, one JSON object per line. Other tests have their kinds."""

from __future__ import annotations

import json

import pytest
from helpers.places import SHARED

from popo_lightning.verifiers.geometry import GeometryVerifier
from popo_lightning.verifiers.math import MathVerifier

CASES = SHARED / "cases" / "answers.jsonl"


@pytest.mark.skipif(not CASES.is_file(), reason="the file of pairs is not on this machine")
def test_every_pair_is_judged_as_the_file_says() -> None:
    verifiers = {"math": MathVerifier(), "geometry": GeometryVerifier()}
    pairs = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= 87
    misjudged = [
        pair
        for pair in pairs
        if verifiers[pair["verifier"]](pair["gold"], f"<think>so</think> \\boxed{{{pair['answer']}}}")["acc"]
        != pair["right"]
    ]
    assert not misjudged
