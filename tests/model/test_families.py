"""Model families: vLLM against the trainer after loading, after a sync of the same weights, and after a step."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.places import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
import families
from families import Found
from tiny_families import FAMILIES
from vllm_faults import MENDED, REASONS

# One family of each kind. scripts/families.py checks all.
WORK = {
    "qwen3": "dense",
    "gemma2": "scaled logits",
    "gemma3_text": "sliding window",
    "qwen3_moe": "experts",
    "falcon_h1": "hybrid",
    "smollm3": "vLLM's transformers backend",
    "qwen2_5_vl": "vision",
    "qwen3_vl": "vision",
}
REFUSED = {
    "gpt_oss": "vLLM reloads no weights into GptOssRoutedExperts",
    "gemma3": "a vision-language model of type gemma3; those that work are",
}


@pytest.mark.slow
@pytest.mark.vllm
def test_families_work_or_are_refused_by_name() -> None:
    assert {FAMILIES[family][0] for family in WORK} == set(WORK.values())
    found = {each.family: each for each in families.run([*WORK, *REFUSED])}
    print(families.table(list(found.values())))
    assert {family for family, each in found.items() if each.verdict == "works"} == set(WORK)
    for family, words in REFUSED.items():
        assert found[family].verdict == "refused" and words in found[family].sentence
        assert family in found[family].sentence


def test_the_table_has_nothing_between() -> None:
    known = [Found(**each) for each in json.loads(families.RESULTS.read_text()).values()]
    assert {found.family for found in known} <= set(FAMILIES)
    assert {found.verdict for found in known} == {"works", "refused"}
    assert families.table(known) in families.TABLE.read_text()
    for found in known:
        assert found.verdict == "works" or "model.path" in found.sentence or "data.engine" in found.sentence
    assert {FAMILIES[found.family][0] for found in known if found.verdict == "works"} >= set(WORK.values())


def test_a_refusal_by_a_fault_of_vllm_says_which() -> None:
    known = [Found(**each) for each in json.loads(families.RESULTS.read_text()).values()]
    assert {found.family for found in known} == set(FAMILIES), "every family is examined"
    refused = {found.family for found in known if found.verdict == "refused"}
    assert set(REASONS) == set(MENDED) and set(REASONS) <= refused
    page = families.TABLE.read_text()
    assert all(f"- {family}: vLLM {REASONS[family]}.\n" in page for family in REASONS)
    # a difference of log-probs does not tell its cause
    assert {found.family for found in known if "nats a token apart" in found.sentence} <= set(REASONS)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("family", ["lfm2", "phimoe", "minimax_m2"])
def test_a_family_works_once_the_fault_is_mended(family: str) -> None:
    """Tests one family for each part of vLLM. scripts/vllm_faults.py has all families."""
    (found,) = families.run([family], mended=True)
    assert found.verdict == "works", found


def test_verdicts() -> None:
    def verdict(**settings: float) -> str:
        return Found("x", "dense", **settings).verdict  # type: ignore[arg-type]

    good = {"loaded": 1e-6, "synced": 1e-6, "moved": 1.0, "stepped": 1e-6}
    assert verdict(**good) == "works"
    for name in good:
        assert verdict(**{other: value for other, value in good.items() if other != name}) == "broken"
    assert verdict(**good | {"synced": 0.2}) == verdict(**good | {"stepped": 0.2}) == "broken"
    assert verdict(**good | {"moved": 0.0}) == verdict(**good | {"stepped": float("nan")}) == "broken"
    assert Found("x", "dense", sentence="no").verdict == "refused" and Found("x", "y", failure="no").verdict == "broken"


def test_a_process_that_ends_is_a_failure_of_its_family_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"loaded": 1e-6, "synced": 1e-6, "moved": 1.0, "stepped": 1e-6}
    begun: list[list[str]] = []

    def worker(waiting: list[str], mended: bool) -> list[Found]:
        assert not mended
        begun.append(list(waiting))
        known = {"qwen3": Found("qwen3", "dense", **good), "gpt_oss": Found("gpt_oss", "experts", sentence="no")}
        if waiting[0] == "llama":
            return []
        return [known[waiting[0]]]

    monkeypatch.setattr(families, "_worker", worker)
    found = list(families.run(["qwen3", "llama", "gpt_oss"]))
    assert [(each.family, each.verdict) for each in found] == [
        ("qwen3", "works"),
        ("llama", "broken"),
        ("gpt_oss", "refused"),
    ]
