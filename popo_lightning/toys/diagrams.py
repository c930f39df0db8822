"""Small line drawings with numbers, which a policy must read to solve a drawn problem.

They are black on white and not to scale; each digit has one fixed shape. Every side is a multiple of 28 pixels, the
square that Qwen2.5-VL turns into one token, so no image is resized for the policy.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[int, int]

PATCH = 14  # side of a patch in pixels, as in Qwen2.5-VL
TOKEN_SIDE = 2 * PATCH
DOT = 2  # a dot of a glyph is this many pixels wide and high
GAP = 4  # pixels between two glyphs
LINE_JITTER = 3  # maximum pixels by which corners move from drawing to drawing
LABEL_JITTER = (1, 2)  # maximum pixels by which labels move across and down
LINE, INK, PAPER = (96, 96, 96), (0, 0, 0), (255, 255, 255)

# Three dots wide and five high, from top to bottom.
GLYPHS = {
    "0": ("###", "#.#", "#.#", "#.#", "###"),
    "1": (".#.", "##.", ".#.", ".#.", "###"),
    "2": ("###", "..#", "###", "#..", "###"),
    "3": ("###", "..#", ".##", "..#", "###"),
    "4": ("#.#", "#.#", "###", "..#", "..#"),
    "5": ("###", "#..", "###", "..#", "###"),
    "6": ("###", "#..", "###", "#.#", "###"),
    "7": ("###", "..#", ".#.", ".#.", ".#."),
    "8": ("###", "#.#", "###", "#.#", "###"),
    "9": ("###", "#.#", "###", "..#", "###"),
    "x": ("#.#", "#.#", ".#.", "#.#", "#.#"),
}


@dataclass(frozen=True)
class Figure:
    """A kind of drawing, before its corners are moved.

    Args:
        size: Width and height in pixels, multiples of 28.
        corners: Named points. They move from drawing to drawing; points on one horizontal or vertical line stay on it.
        lines: Pairs of corners, one letter each.
        places: Center of each label, in the order of the labels. Its x is a multiple of 14, its y 7 more than such a
            multiple, so each of two digits lies in one patch of the vision tower, wherever the label moves.
    """

    size: Point
    corners: Mapping[str, Point]
    lines: Sequence[str]
    places: Sequence[Point]

    def draw(self, labels: Sequence[str], draw: random.Random) -> Any:
        """Draws an RGB image with these labels. The generator decides the positions of corners and labels."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size, PAPER)
        canvas = ImageDraw.Draw(image)
        across = {x: x + draw.randint(-LINE_JITTER, LINE_JITTER) for x, _ in self.corners.values()}
        down = {y: y + draw.randint(-LINE_JITTER, LINE_JITTER) for _, y in self.corners.values()}
        corners = {name: (across[x], down[y]) for name, (x, y) in self.corners.items()}
        for line in self.lines:
            canvas.line([corners[end] for end in line], fill=LINE, width=1)
        for label, (x, y) in zip(labels, self.places, strict=True):
            right, lower = (draw.randint(-most, most) for most in LABEL_JITTER)
            _write(canvas, label, (x + right, y + lower))
        return image

    def glyphs(self, labels: Sequence[str]) -> list[tuple[str, int, int]]:
        """Returns (symbol, column, row) of every glyph, in patches. They are the same in all drawings."""
        return [
            (symbol, x // PATCH - place, y // PATCH)
            for label, (x, y) in zip(labels, self.places, strict=True)
            for place, symbol in enumerate(reversed(label))
        ]


def _write(canvas: Any, label: str, middle: Point) -> None:
    """Writes one glyph right of the middle and others left of it, on blank paper, so no line crosses a digit."""
    width, height = 3 * DOT, 5 * DOT
    top = middle[1] - height // 2
    for place, symbol in enumerate(reversed(label)):
        left = middle[0] + GAP // 2 - place * (width + GAP)
        canvas.rectangle((left - 2, top - 2, left + width + 1, top + height + 1), fill=PAPER)
        for row, dots in enumerate(GLYPHS[symbol]):
            for column, dot in enumerate(dots):
                if dot == "#":
                    x, y = left + column * DOT, top + row * DOT
                    canvas.rectangle((x, y, x + DOT - 1, y + DOT - 1), fill=INK)


def png(image: Any) -> bytes:
    """Returns the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


STRAIGHT_LINE = Figure(
    (112, 56), {"A": (4, 52), "B": (108, 52), "V": (56, 52), "R": (62, 6)}, ["AB", "VR"], [(28, 35), (84, 35)]
)
ISOSCELES = Figure(
    (84, 84),
    {"A": (6, 76), "B": (78, 76), "C": (42, 6), "p": (19, 40), "q": (28, 44), "r": (65, 40), "s": (56, 44)},
    ["AB", "BC", "CA", "pq", "rs"],
    [(28, 63), (42, 35)],
)
TRIANGLE = Figure(
    (112, 84), {"A": (4, 76), "B": (108, 76), "C": (58, 6)}, ["AB", "BC", "CA"], [(28, 63), (84, 63), (56, 35)]
)
EXTERIOR = Figure(
    (112, 84),
    {"A": (4, 76), "B": (70, 76), "C": (40, 6), "D": (108, 76)},
    ["AD", "BC", "CA"],
    [(28, 63), (42, 35), (84, 63)],
)
RECTANGLE = Figure(
    (84, 84), {"A": (6, 6), "B": (54, 6), "C": (54, 50), "D": (6, 50)}, ["AB", "BC", "CD", "DA"], [(28, 63), (70, 35)]
)
# A small square marks the right angle. Labels: lower leg, upright leg, hypotenuse.
_CORNERS = {"A": (54, 6), "B": (54, 50), "C": (4, 50), "p": (54, 42), "q": (46, 42), "r": (46, 50)}
_LINES = ["AB", "BC", "CA", "pq", "qr"]
LEGS = Figure((84, 84), _CORNERS, _LINES, [(28, 63), (70, 35)])
RIGHT_TRIANGLE = Figure((84, 84), _CORNERS, _LINES, [(28, 63), (70, 35), (14, 21)])
