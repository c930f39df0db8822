"""What happens to a response between the engine and its group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graders import score_begun
from helpers.tiny_models import fit, tiny_task
from helpers.verifiers import Length

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.timing import PhaseClock
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.base import RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.grading.overlong import SoftOverlong
from popo_lightning.grading.pool import GradingPool
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.tasks.regraded import Regraded


class Says(TransformersEngine):
    """Answers with responses of the given lengths."""

    version = 3
    stream = RolloutEngine.stream  # calls generate

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def generate(self, prompts: Any, n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        made = [Response(torch.arange(length), torch.zeros(length), "stop", "said") for length in self.lengths]
        return [made for _ in prompts]


def made(policy: Path, problem: Problem, engine: Says, overlong: SoftOverlong | None = None) -> Group:
    with GradingPool(score_begun) as pool:
        encoder = PromptEncoder(policy, 30)
        encoder.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        generator = RolloutGenerator(encoder, engine, pool, PhaseClock(), 1, 2, torch.float32, overlong)
        generator.make([problem], 4, Sampling(20), 0)
        (group,) = generator.make([problem], 4, Sampling(20), 0)
    assert (group.id, group.version) == (3, 3)  # the second group of rank 1 of 2
    return group


def test_overlong_penalty_by_hand() -> None:
    overlong = SoftOverlong(buffer_tokens=4)
    lengths = [1, 16, 17, 18, 20, 25]
    assert overlong.penalties(lengths, 20) == [0, 0, -0.25, -0.5, -1, -1]
    assert SoftOverlong(4, most=0.5).penalties(lengths, 20) == [0, 0, -0.125, -0.25, -0.5, -0.5]


def test_overlong_takes_from_the_score_and_leaves_accuracy(policy: Path) -> None:
    problem = Problem("p", "1,2>3:", "said")
    group = made(policy, problem, Says(16, 18, 20), SoftOverlong(4))
    assert [r.parts["score"] for r in group.responses] == [1, 0.5, 0]
    assert [r.parts["overlong"] for r in group.responses] == [0, -0.5, -1]
    assert [r.parts["acc"] for r in group.responses] == [1, 1, 1]
    assert group.is_effective("score") and not group.is_effective("acc")
    assert "overlong" not in made(policy, problem, Says(16, 18, 20)).responses[0].parts


def test_the_verifier_reads_the_response_from_where_the_prompt_began_it(policy: Path) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>"}]
    begun = made(policy, Problem("p", messages, "<think>said"), Says(3))
    assert begun.responses[0].parts["score"] == 1 and begun.responses[0].text == "said"
    assert made(policy, Problem("p", messages[:1], "<think>said"), Says(3)).responses[0].parts["score"] == 0


@pytest.mark.parametrize(
    ("template", "begun"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}",
            "<think>\n",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<think>", "<think>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n\n</think>\n\n", ""),
    ],
)
def test_the_verifier_reads_the_tag_that_the_template_opened(policy: Path, template: str, begun: str) -> None:
    problem = Problem("p", [{"role": "user", "content": "1"}], begun + "said")
    with GradingPool(score_begun) as pool:
        encoder = PromptEncoder(policy, 30)
        encoder.tokenizer.chat_template = template
        generator = RolloutGenerator(encoder, Says(3), pool, PhaseClock(), 0, 1, torch.float32, None)
        (group,) = generator.make([problem], 2, Sampling(20), 0)
    assert [response.parts["score"] for response in group.responses] == [1]
    assert group.responses[0].text == "said"


def test_the_verifier_reads_the_tag_at_the_end_of_a_plain_prompt(policy: Path) -> None:
    assert made(policy, Problem("p", "1\n<think>", "<think>said"), Says(3)).responses[0].parts["score"] == 1


def test_a_prompt_that_mentions_the_tag_opens_nothing(policy: Path) -> None:
    problem = Problem("p", [{"role": "user", "content": "1<think>"}, {"role": "assistant", "content": "2"}], "2said")
    assert made(policy, problem, Says(3)).responses[0].parts["score"] == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"overlong": SoftOverlong(8), "max_new_tokens": 8}, r"data\.overlong\.buffer_tokens is 8 but"),
        ({"image_pixels": (9, 4)}, r"data\.image_pixels is \[9, 4\]"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        RolloutDataModule(tiny_task(), **settings)


def test_overlong_settings() -> None:
    with pytest.raises(SettingError, match="buffer_tokens is 0"):
        SoftOverlong(0)
    with pytest.raises(SettingError, match=r"most is -1\.0"):
        SoftOverlong(4, -1.0)


def test_effective_by_accuracy_and_trained_on_the_score(policy: Path, tmp_path: Path) -> None:
    """With the overlong penalty scores differ almost everywhere, so accuracy decides what is replayed."""
    found = fit(policy, tmp_path, overlong=SoftOverlong(9), effective_key="acc", group_size=3, iterations=2)
    share = found.rows[0]["rollout/effective_share"]
    assert 0 < share < 1
    assert found.rows[0]["reward/overlong"] < 0 and found.rows[0]["reward/score"] < found.rows[0]["reward/acc"]
    by_score = fit(policy, tmp_path / "score", overlong=SoftOverlong(9), group_size=3, iterations=1)
    assert by_score.rows[0]["rollout/effective_share"] >= share


def test_what_is_trained_on_decides_what_is_effective(policy: Path, tmp_path: Path) -> None:
    """With acc, responses that differ in their score alone teach nothing."""
    settings: dict[str, Any] = {"task": Regraded(tiny_task(), Length()), "iterations": 1, "lr": 0.0}
    by_acc = fit(policy, tmp_path / "acc", model={"reward_key": "acc"}, **settings)
    by_score = fit(policy, tmp_path / "score", **settings)
    assert by_acc.rows[0]["rollout/effective_share"] == 0 < by_score.rows[0]["rollout/effective_share"]
    by_key = fit(policy, tmp_path / "key", effective_key="acc", **settings)
    assert by_key.rows[0]["rollout/effective_share"] == 0
