"""Stop strings end a response at the same token on every engine and change no draw before it."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graders import FailsOn
from helpers.stops import common, first_by_hand
from helpers.tiny_models import fit, random_model
from rollout.test_generation import Says
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines import decoding
from popo_lightning.engines.base import EngineContext, Sampling, responses_of
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.grading.pool import GradingPool
from popo_lightning.model.prompts import Prompt, PromptEncoder
from popo_lightning.rollout.generation import RolloutGenerator
from popo_lightning.tasks.template import NEXT_QUESTION, Template


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Returns a byte-level tokenizer: tokens begin with spaces, span parts of labels, and are parts of characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = ["Question: what is √2?\nAnswer: 1.41\n\nQuestion: é 漢字?\nAnswer: no"] * 20
    settings = {"vocab_size": 360, "special_tokens": ["<end>"], "show_progress": False}
    settings |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    made.train_from_iterator(text, trainers.BpeTrainer(**settings))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def test_cut_is_at_the_token_that_completes_the_first_string(tokenizer: Any) -> None:
    draw, cut = random.Random(0), 0
    text = "It is √2.\nAnswer: 1.41\n\nQuestion: what?\nQ: 漢字é"
    for _ in range(200):
        words = draw.sample(text.split(" "), 5)
        ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"] + [
            draw.randrange(len(tokenizer)) for _ in range(draw.randrange(6))
        ]
        stop = draw.sample(["\n\nQuestion:", "\nQ:", "é", "字", "swer", " ", "41\n", "zzz"], 3)
        expected = first_by_hand(tokenizer, ids, stop)
        assert StopStrings(tokenizer, stop).cut(ids) == expected
        cut += expected is not None
    assert cut > 50
    assert not StopStrings(tokenizer, ()) and StopStrings(tokenizer, ()).cut([1, 2]) is None


def test_a_response_keeps_the_string_and_its_text_does_not(tokenizer: Any) -> None:
    ids = tokenizer("It is 2.\n\nQuestion: what", add_special_tokens=False)["input_ids"]
    logps = [-float(i) for i in range(len(ids))]
    (cut,) = responses_of(tokenizer, [(ids, logps, "length")], ["\n\nQuestion:"])
    assert cut.text == "It is 2." and cut.finish_reason == "stop"
    assert tokenizer.decode(cut.token_ids).endswith("\n\nQuestion:")
    assert cut.behave_logp.tolist() == logps[: len(cut.token_ids)]
    (whole,) = responses_of(tokenizer, [(ids, logps, "length")], ["\n\nProblem:"])
    assert whole.finish_reason == "length" and whole.token_ids.tolist() == ids
    ended = [*ids, tokenizer.eos_token_id]
    (by_token,) = responses_of(tokenizer, [(ended, [*logps, 0.0], "stop")], ["<end>"])  # it is no text
    assert by_token.token_ids.tolist() == ended and by_token.text == "It is 2.\n\nQuestion: what"


@pytest.mark.parametrize("unread", [1, 5])
def test_rows_that_have_stopped_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: int) -> None:
    """The transformers engine notices a stop string within `unread` steps. Other rows then take the place."""
    engine = TransformersEngine(4)
    engine.start(EngineContext(random_model("llama-tied", tmp_path), torch.device("cpu"), torch.float64, 0, 1, 400))
    monkeypatch.setattr(decoding, "STEPS_UNREAD", unread)
    steps = []
    step = decoding.Decoder._step

    def counted(self: decoding.Decoder, *args: Any) -> None:
        self.steps_unread = unread
        steps.append(1)
        step(self, *args)

    monkeypatch.setattr(decoding.Decoder, "_step", counted)
    prompts = [Prompt(torch.tensor([5, 6, 7])), Prompt(torch.tensor([8]))]
    free = engine.generate(prompts, 6, Sampling(100), 5)
    whole = len(steps)
    stop = (common(free, 1),)
    stopped = engine.generate(prompts, 6, Sampling(100, stop=stop), 5)
    assert len(steps) - whole < whole / 2
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        assert after.token_ids.tolist() == before.token_ids[: len(after.token_ids)].tolist()
        assert stop[0] not in after.text


def test_a_prefix_is_read_with_the_text_before_the_string(policy: Path) -> None:
    class Stops(Says):
        def generate(self, prompts: Any, n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
            assert sampling.stop == (";",)
            return [responses_of(encoder.tokenizer, [(ids, [0.0] * len(ids), "length")], sampling.stop)] * len(prompts)

    seen = []

    class Pool(GradingPool):
        def submit(self, items: Any) -> None:
            seen.extend(text for _, text in items)
            super().submit(items)

    encoder = PromptEncoder(policy, 30)
    ids = encoder.tokenizer("3=5;5*2", add_special_tokens=False)["input_ids"]
    prefix = torch.tensor(encoder.tokenizer("7;2", add_special_tokens=False)["input_ids"])
    with Pool(FailsOn()) as pool:
        generator = RolloutGenerator(encoder, Stops(), pool, PhaseClock(), 0, 1, torch.float32, None)
        generator.make([Problem("p", "1,2>3:", None)], 1, Sampling(20, stop=(";",)), 0, [prefix])
    assert seen == ["7;23=5"]  # the prefix has the string too, but is not part of the response


@pytest.mark.parametrize(
    ("template", "own"),
    [
        ("{prompt}", ()),
        ("Question: {prompt}\nAnswer:", ()),
        ("Exercise: {prompt}\nSolution:", ("\nExercise:",)),
        ("Exercise: 1+1\nSolution: 2\n\nExercise: {prompt}\nSolution:", ("\nExercise:",)),
        ("Solve {prompt}", ()),
        ("- {prompt}", ()),
        ("\\boxed{x}: {prompt}", ("\n\\boxed{x}:",)),
    ],
)
def test_the_next_question_of_a_plain_prompt(template: str, own: tuple[str, ...]) -> None:
    assert Template(template).next_question() == (*NEXT_QUESTION, *own)


def test_a_run_stops_at_its_strings_and_empty_ones_are_refused(policy: Path, tmp_path: Path) -> None:
    texts: list[str] = []
    free = fit(policy, tmp_path / "free", iterations=1)
    assert free.data.sampling.stop == ()
    run = fit(policy, tmp_path / "stopped", iterations=1, stop=["="])
    texts = [response.text for group in run.data.report.fresh for response in group.responses]
    assert texts and not any("=" in text for text in texts)
    assert run.rows[0]["rollout/response_tokens"] < free.rows[0]["rollout/response_tokens"]
    assert run.rows[0]["rollout/truncated_frac"] == 0
    with pytest.raises(SettingError, match=r"data\.stop is \['x', ''\]"):
        fit(policy, tmp_path / "empty", stop=["x", ""])
