"""Drawn geometry: its questions, its drawings, and the grading of answers."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from math import sqrt
from typing import Any

import pytest
from PIL import Image

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.toys import diagrams
from popo_lightning.toys.countdown import write_steps
from popo_lightning.toys.diagrams import DOT, GAP, GLYPHS, INK, LABEL_JITTER, Figure
from popo_lightning.toys.drawn_geometry import KINDS, DrawnGeometry, problem, verify_drawn

COUNTS = {  # problems of each kind, counted in another way
    "straight line": 90,
    "isosceles triangle": 76,
    "third angle": 13 * 18 + 17 + 16 + 15 + 14 + 13,  # partners of 10 to 70, of 75, ... of 95
    "exterior angle": 13 * 18 + 17 + 16 + 15 + 14 + 13,
    "rectangle area": 11 * 11,
    "rectangle perimeter": 11 * 11,
    "triangle area": 11 * 11 - 5 * 5,
    "hypotenuse": 2 * 20,  # 20 triples with a hypotenuse of at most 50
    "leg": 2 * 20,
}


@pytest.fixture(scope="module")
def task() -> DrawnGeometry:
    return DrawnGeometry(tuple(KINDS), problems_per_kind=60, held_out_problems=135)


def by_geometry(kind: str, numbers: tuple[int, ...]) -> float:
    """Returns the answer from first principles, not from written steps."""
    a, b = numbers if len(numbers) == 2 else (numbers[0], numbers[0])
    corners = {"rectangle area": [(0, 0), (a, 0), (a, b), (0, b)], "triangle area": [(0, 0), (a, 0), (0, b)]}.get(kind)
    if corners:  # shoelace formula
        following = [*corners[1:], corners[0]]
        return abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, following, strict=True))) / 2
    others = {
        "straight line": 180.0 - a,
        "isosceles triangle": 180.0 - a - a,
        "third angle": 180.0 - a - b,
        "exterior angle": 180.0 - (180.0 - a - b),  # beside the third angle
        "rectangle perimeter": float(a + b + a + b),
        "hypotenuse": sqrt(a**2 + b**2),
        "leg": sqrt(abs(b**2 - a**2)),
    }
    return others[kind]


# -- problems ------------------------------------------------------------------------------------------------------


def test_every_answer_is_exact_and_written_steps_reach_it() -> None:
    for kind, asked in KINDS.items():
        every_numbers = list(asked.numbers)
        assert len(every_numbers) == len(set(every_numbers)) == COUNTS[kind], kind
        for numbers in every_numbers:
            steps = asked.formula(*numbers)
            assert steps[-1][3] == by_geometry(kind, numbers) > 0, (kind, numbers)
            verdict = verify_drawn(steps[-1][3], write_steps(steps))
            assert verdict == {"score": 1, "acc": 1, "format": 1, "true_steps": 1}, (kind, numbers)
            assert all(len(str(number)) <= 2 for number in numbers)


def parts(asked: Problem) -> tuple[str, tuple[int, ...]]:
    kind, numbers = asked.id.split("/")[0].split(":")
    return kind, tuple(map(int, numbers.split(",")))


def test_problems_say_in_words_only_what_is_asked(task: DrawnGeometry) -> None:
    for asked in [*task.train_problems(), *task.benchmarks()["geometry"]]:
        kind, numbers = parts(asked)
        assert asked.prompt == [{"role": "user", "content": f"<image>{KINDS[kind].question}"}]
        assert not any(c.isdigit() for c in KINDS[kind].question)
        assert asked.answer == by_geometry(kind, numbers) and isinstance(asked.answer, int)
        assert asked.info == {"subject": kind, "level": len(KINDS[kind].formula(*numbers))}
        assert len(asked.images) == 1
    assert {k.question for k in KINDS.values()} == {"x?", "area?", "perimeter?"}


def test_every_kind_is_asked_equally_often(task: DrawnGeometry) -> None:
    train, held_out = task.train_problems(), task.benchmarks()["geometry"]
    assert Counter(p.info["subject"] for p in train) == dict.fromkeys(KINDS, 60)
    assert Counter(p.info["subject"] for p in held_out) == dict.fromkeys(KINDS, 15)
    ids = [p.id for p in [*train, *held_out]]
    assert len(ids) == len(set(ids))
    assert [p.id for p in DrawnGeometry(tuple(KINDS), held_out_problems=4).benchmarks()["geometry"]] == ids[
        len(train) :
    ][:4]
    assert {p.info["subject"] for p in DrawnGeometry(["leg", "hypotenuse"], 3).train_problems()} == {
        "leg",
        "hypotenuse",
    }


def test_held_out_numbers_are_never_trained_on_in_any_order_or_drawing(task: DrawnGeometry) -> None:
    def content(asked: Problem) -> tuple[str, tuple[int, ...]]:
        kind, numbers = parts(asked)
        return kind, tuple(sorted(numbers))

    trained = {content(p) for p in task.train_problems()}
    held_out = {content(p) for p in task.benchmarks()["geometry"]}
    assert trained and held_out and not trained & held_out
    for kind, asked in KINDS.items():
        train, rest = task.split(kind)
        assert sorted(train + rest) == sorted(asked.numbers)
        assert not {tuple(sorted(n)) for n in train} & {tuple(sorted(n)) for n in rest}
        assert abs(len(rest) / len(train + rest) - 0.25) < 0.2, kind


def test_a_kind_with_few_numbers_is_drawn_again() -> None:
    found = DrawnGeometry(["hypotenuse"], problems_per_kind=100).train_problems()
    assert len({parts(p) for p in found}) == len(DrawnGeometry().split("hypotenuse")[0])
    assert len({p.images[0] for p in found}) > 95


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kinds": ["circle"]}, "kinds names 'circle'; use some of straight line"),
        ({"kinds": []}, "kinds names ''; use some of straight line"),
        ({"problems_per_kind": 0}, "problems_per_kind is 0; .* at least 1"),
        ({"held_out_problems": 0}, "held_out_problems is 0; .* at least 1"),
        ({"held_out_share": 1.0}, "held_out_share is 1.0; it must be between 0 and 1"),
        ({"held_out_share": 0.001}, "leaves 'isosceles triangle' no problem to hold out; raise it"),
        ({"held_out_share": 0.9999}, "leaves 'straight line' nothing to train on; lower it"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        DrawnGeometry(**settings).train_problems()


# -- diagrams ------------------------------------------------------------------------------------------------------


def picture(asked: Problem) -> Image.Image:
    (file,) = asked.images
    assert isinstance(file, bytes)
    return Image.open(io.BytesIO(file))


def test_images_survive_the_processor_as_they_are(task: DrawnGeometry) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for asked in task.train_problems():
        image = picture(asked)
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", KINDS[parts(asked)[0]].figure.size)
        assert smart_resize(image.height, image.width, min_pixels=28 * 28) == (image.height, image.width)
        assert image.width * image.height <= 12 * 28 * 28


DRAW = """
import hashlib, io
from PIL import Image
from popo_lightning.toys.drawn_geometry import KINDS, problem
numbers = dict.fromkeys(KINDS, (6, 8)) | {"straight line": (47,), "isosceles triangle": (35,), "leg": (6, 10)}
images = [Image.open(io.BytesIO(problem(kind, numbers[kind], 7).images[0])) for kind in KINDS]
digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
"""
# If drawings change, so does what warm-started policies have learned to read. Raise RECIPE with the digest.
DIGEST = "35a8e0d0e62259980d8ec9fa3b36ebf8543f4b5270d18ad2e1a94092d8f2f7f2"


def test_drawings_are_the_same_in_every_process_and_release() -> None:
    here: dict[str, str] = {}
    exec(DRAW, here)
    run = subprocess.run([sys.executable, "-c", f"{DRAW}print(digest)"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here["digest"] == DIGEST
    assert len({problem("leg", (3, 5), drawing).images[0] for drawing in (0, 0, 1, 2)}) == 3


def glyph_at(image: Image.Image, left: int, top: int) -> str | None:
    """Returns the symbol that has exactly the black dots in a glyph's box at this corner."""
    seen = {
        (c, r)
        for r in range(5)
        for c in range(3)
        if all(image.getpixel((left + c * DOT + i, top + r * DOT + j)) == INK for i in range(DOT) for j in range(DOT))
    }
    for symbol, rows in GLYPHS.items():
        if seen == {(c, r) for r, row in enumerate(rows) for c, dot in enumerate(row) if dot == "#"}:
            return symbol
    return None


def read_label(image: Image.Image, middle: tuple[int, int]) -> list[str]:
    """Returns the labels found around a middle, at any offset."""
    found = []
    for right in range(-LABEL_JITTER[0], LABEL_JITTER[0] + 1):
        for lower in range(-LABEL_JITTER[1], LABEL_JITTER[1] + 1):
            left, top = middle[0] + right + GAP // 2, middle[1] + lower - 5 * DOT // 2
            ones = glyph_at(image, left, top)
            tens = glyph_at(image, left - 3 * DOT - GAP, top)
            if ones:
                found.append((tens or "") + ones)
    return found


def test_every_label_can_be_read_from_its_place(task: DrawnGeometry) -> None:
    for asked in task.train_problems():
        kind, numbers = parts(asked)
        figure, labels = KINDS[kind].figure, KINDS[kind].labels
        written = {"a": str(numbers[0]), "b": str(numbers[-1]), "x": "x"}
        image = picture(asked)
        assert [read_label(image, place) for place in figure.places] == [[written[label]] for label in labels], asked.id


def test_a_digit_never_crosses_the_border_of_a_patch() -> None:
    figures = [figure for figure in vars(diagrams).values() if isinstance(figure, Figure)]
    assert len(figures) == 7
    for figure in figures:
        for x, y in figure.places:
            assert x % 14 == 0 and y % 14 == 7
    across, down = LABEL_JITTER
    assert GAP // 2 + 3 * DOT + across <= 14 and GAP // 2 - across >= 0
    assert 5 * DOT + 2 * down <= 14


def test_lines_and_numbers_differ_from_drawing_to_drawing() -> None:
    lines = {picture(problem("rectangle area", (4, 9), drawing)).tobytes() for drawing in range(40)}
    assert len(lines) == 40


# -- verifier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("45+78=123;180-123=57", (1, 1, 1)),
        (" 180-123=57\n", (1, 1, 1)),
        ("57/1=57", (1, 1, 1)),
        ("1+1=57", (1, 1, 0)),  # the answer is right, and the metric shows the wrong step
        ("1+1=3;60-3=57", (1, 1, 0)),
        ("1/0=57", (1, 1, 0)),
        ("45+78=123", (0, 1, 1)),
        ("180-123=57;57+1=58", (0, 1, 1)),
        ("7/2=3", (0, 1, 0)),
        ("57", (0, 0, 0)),
        ("=57", (0, 0, 0)),
        ("", (0, 0, 0)),
        (";", (0, 0, 0)),
        ("180-123=57;", (0, 0, 0)),
        ("180-123=57x", (0, 0, 0)),
        ("180 - 123 = 57", (0, 0, 0)),
        ("180-123=-57", (0, 0, 0)),
        ("180-123=+57", (0, 0, 0)),
        ("9**9=57", (0, 0, 0)),
        ("1+1=0000057", (0, 0, 0)),
        ("180-123=\u0665\u0667", (0, 0, 0)),  # digits of another script
        ("180-123=57;" * 40 + "180-123=57", (0, 0, 0)),  # too long
        ("1" * 390 + "=57", (0, 0, 0)),
        ("__import__('os')", (0, 0, 0)),
        ("\x00", (0, 0, 0)),
    ],
)
def test_verifier(text: str, verdict: tuple[int, int, int]) -> None:
    right, form, true_steps = verdict
    expected = {"score": right, "acc": right, "format": form, "true_steps": true_steps}
    assert verify_drawn(57, text) == expected


def test_verifier_needs_no_torch() -> None:
    code = "import popo_lightning.toys.drawn_geometry, sys; print('torch' in sys.modules, 'PIL' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
