"""The tiny vision-language policy: its training examples, its folder, and what can load it."""

from __future__ import annotations

import inspect
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.toys import geometry_policy as geometry_warm_start
from popo_lightning.toys import glyph_reader
from popo_lightning.toys.countdown import write_steps
from popo_lightning.toys.diagrams import GLYPHS
from popo_lightning.toys.drawn_geometry import KINDS, DrawnGeometry, problem, verify_drawn
from popo_lightning.toys.geometry_policy import (
    IGNORED,
    MISTAKES,
    SPECIAL,
    SYMBOLS,
    Example,
    GeometryWarmStart,
    wrong_steps,
)
from popo_lightning.toys.glyph_reader import GlyphReader

TINY: dict[str, Any] = {
    "examples": 320,
    "batch_size": 8,
    "hidden_size": 32,
    "layers": 1,
    "intermediate_size": 32,
    "vision_hidden_size": 32,
    "vision_layers": 1,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return GeometryWarmStart(**TINY).folder()


def examples(count: int, **settings: Any) -> list[Example]:
    return list(islice(GeometryWarmStart(**settings)._examples(), count))


# -- examples ------------------------------------------------------------------------------------------------------


def test_every_answer_is_true_and_short_enough_for_the_configuration() -> None:
    for example in examples(1500):
        assert verify_drawn(0, example.answer)["true_steps"] == 1, example.answer
        assert len(example.answer) < 28 and set(example.answer + example.question) <= set(SYMBOLS)


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_wrong_and_the_usual_one_is_usual(kind: str) -> None:
    draw, usual, wrong = random.Random(0), 0, 0
    every_numbers = list(KINDS[kind].numbers)
    for _ in range(400):
        numbers = draw.choice(every_numbers)
        answer = KINDS[kind].formula(*numbers)[-1][3]
        steps = wrong_steps(kind, numbers, 0.5, draw)
        assert verify_drawn(0, write_steps(steps))["true_steps"] == 1
        wrong += steps[-1][3] != answer
        usual += steps == MISTAKES[kind][0](*numbers)
    assert wrong > 380  # some mistakes are right by chance, such as with two equal sides of 4
    assert 0.4 < usual / 400 < 0.7 or ((kind, usual) == ("straight line", usual) and usual / 400 > 0.4)


def test_share_of_right_examples() -> None:
    def share(right: float) -> float:
        kinds = ["third angle"]  # for these, no mistake is right by chance
        drawn = examples(300, right=right, kinds=kinds)
        return sum(e.answer.startswith("180") is False and "180-" in e.answer for e in drawn) / len(drawn)

    assert share(0) == 0
    assert share(0.3) == pytest.approx(0.3, abs=0.08)
    assert share(1) == 1


def test_examples_never_show_a_held_out_problem() -> None:
    kinds = ["third angle", "rectangle area"]
    task = DrawnGeometry(kinds)
    train = {(kind, tuple(KINDS[kind].write(n))) for kind in kinds for n in task.split(kind)[0]}
    shown = set()
    for example in examples(3000, kinds=kinds):
        kind = "rectangle area" if example.question == "area?" else "third angle"
        labels: dict[tuple[int, int], str] = {(column, row): symbol for symbol, column, row in example.glyphs}
        written = []
        for x, y in KINDS[kind].figure.places:
            ones, tens = labels[x // 14, y // 14], labels.get((x // 14 - 1, y // 14), "")
            written.append(tens + ones)
        shown.add((kind, tuple(written)))
    assert shown <= train and len(shown) > 0.95 * len(train)


def test_examples_follow_the_seed() -> None:
    def key(found: list[Example]) -> list[tuple[str, bytes]]:
        return [(e.answer, e.image.tobytes()) for e in found]

    assert key(examples(20)) == key(examples(20)) != key(examples(20, seed=1))


def test_labels_are_the_answer_and_its_end() -> None:
    processor = geometry_warm_start._processor()
    batch = examples(32)
    inputs, labels = geometry_warm_start._encode(batch, processor)
    for row, example in enumerate(batch):
        kept = labels[row][labels[row] != IGNORED].tolist()
        assert kept == [*(SYMBOLS.index(c) for c in example.answer), SYMBOLS.index("<eos>")]
        first = int((labels[row] != IGNORED).nonzero()[0])
        assert int(inputs["input_ids"][row, first - 1]) == SYMBOLS.index(":")
        assert torch.equal(labels[row, first : first + len(kept)], inputs["input_ids"][row, first : first + len(kept)])


def test_glyph_targets_lie_where_the_tower_sees_them() -> None:
    """The tower's tokens go row by row, four patches each. Their pixels come from the processor."""
    processor, reader = geometry_warm_start._processor(), GlyphReader(8)
    batch = examples(24)
    inputs, _ = geometry_warm_start._encode(batch, processor)
    patches = inputs["pixel_values"].view(-1, 3, 2, 14, 14)[:, 0, 0]
    reader.seen = torch.zeros(len(patches) // 4, 8)
    reader.names = torch.nn.Linear(8, 4 * (1 + len(GLYPHS)))
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyph_reader, "cross_entropy", lambda scores, targets, weights: seen.append(targets))
        reader.loss([e.glyphs for e in batch], inputs["image_grid_thw"])
    (targets,) = seen
    assert len(targets) == len(patches)
    ink = (patches < patches.min() + 1e-3).sum((1, 2))
    dots = [0, *(4 * sum(row.count("#") for row in rows) for rows in GLYPHS.values())]
    assert ink.tolist() == [dots[target] for target in targets.tolist()]


# -- the folder ----------------------------------------------------------------------------------------------------


def test_folder_loads_and_prompts_are_those_of_the_training(built: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(built)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(built)).__name__ == "Qwen2_5_VLProcessor"
    assert model.lm_head.weight is model.get_input_embeddings().weight
    encoder = PromptEncoder(built, 64)
    asked = problem("third angle", (45, 78), 0)
    prompt = encoder.encode(asked)
    image = KINDS["third angle"].figure.draw(KINDS["third angle"].write((45, 78)), random.Random(asked.id))
    inputs, _ = geometry_warm_start._encode([Example("x?", image, [], "")], geometry_warm_start._processor())
    assert prompt.ids.tolist() == inputs["input_ids"][0, :-1].tolist()
    assert torch.equal(prompt.images["pixel_values"], inputs["pixel_values"])
    assert prompt.images["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert len(prompt.ids) == encoder.length(asked) == 12 + 2 + 3
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert logits.isfinite().all()


def test_prompts_fit_the_configuration(built: Path) -> None:
    encoder = PromptEncoder(built, 32)
    problems = DrawnGeometry(problems_per_kind=2).train_problems()
    assert encoder.fitting(problems) == problems


def test_template_puts_the_colon_before_what_the_response_begins_with(built: Path) -> None:
    encoder = PromptEncoder(built, 64)
    begun = Problem("begun", [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "180-"}], 57)
    assert encoder.tokenizer.decode(encoder.encode(begun).ids) == "x?:180-"


def test_tokenizer_is_one_token_a_symbol_and_back(built: Path) -> None:
    tokenizer = PromptEncoder(built, 64).tokenizer
    for place, symbol in enumerate(SYMBOLS):
        assert tokenizer(symbol)["input_ids"] == [place]
    for example in examples(50):
        ids = tokenizer(example.answer)["input_ids"]
        assert len(ids) == len(example.answer) and tokenizer.decode(ids) == example.answer
        assert tokenizer.decode([*ids, 1, *range(len(SPECIAL))], skip_special_tokens=True) == example.answer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_build_is_deterministic_and_leaves_random_state_alone(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = GeometryWarmStart(**TINY).folder()
    assert torch.equal(torch.get_rng_state(), state)
    assert again != built and again.name == built.name
    left, right = load_file(built / "model.safetensors"), load_file(again / "model.safetensors")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert not any("names" in name for name in left)  # the glyph reader is not saved


def test_naming_glyphs_shapes_the_vision_tower(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path))
    real = GlyphReader.loss
    monkeypatch.setattr(GlyphReader, "loss", lambda *arguments: 0 * real(*arguments))
    without = load_file(GeometryWarmStart(**TINY).folder() / "model.safetensors")
    shaped = load_file(built / "model.safetensors")
    assert not torch.equal(without["visual.patch_embed.proj.weight"], shaped["visual.patch_embed.proj.weight"])


def test_training_moves_image_and_language(built: Path) -> None:
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

    warm_start = GeometryWarmStart(**TINY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = dict(Qwen2_5_VLForConditionalGeneration(warm_start.config()).float().named_parameters())
    trained = dict(AutoModelForImageTextToText.from_pretrained(built).named_parameters())
    assert fresh.keys() == trained.keys()
    assert not [name for name in fresh if torch.equal(fresh[name], trained[name])]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"right": 1.5}, "right is 1.5; use a share"),
        ({"usual_mistake": -1}, "usual_mistake is -1; use a share"),
        ({"hidden_size": 48}, "hidden_size is 48; use a multiple of 32"),
        ({"vision_hidden_size": 0}, "vision_hidden_size is 0; use a multiple of 32"),
        ({"examples": 100}, "examples is 100, fewer than 40 batches"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        GeometryWarmStart(**settings)


def test_address_follows_every_setting() -> None:
    changes: list[dict[str, Any]] = [{}, {"right": 0.3}, {"kinds": ["leg"]}, {"seed": 1}, {"vision_layers": 1}]
    recipes = [GeometryWarmStart(**change).recipe() for change in changes]
    assert len({str(recipe) for recipe in recipes}) == len(changes)
    assert set(recipes[0]) == {"recipe", *inspect.signature(GeometryWarmStart).parameters}
