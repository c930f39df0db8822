"""Golds of the real data sets are still right after each rewriting that applies.

A rewriting is a rule of spelling or of elementary algebra. `rewritings` has all of them. A pair is a gold and one
rewriting of it. At least `MIN_SHARE` of the pairs must be graded right.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from helpers.places import SHARED

from popo_lightning.verifiers.math import MathVerifier

DATA = SHARED / "data" / "math"
SETS = [
    "math500",
    "minerva",
    "olympiadbench",
    "amc22_23",
    "aime_train",
    "math_train",
    "deepscaler_train",
    "dsr_sub_traces",
]
GOLDS_OF_EACH = 300
MIN_SHARE = 0.99

_FRACTION = re.compile(r"\\d?frac\{(-?\d+)\}\{(\d+)\}")
_INTERVAL = re.compile(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])")


def rewritings(gold: str) -> Iterator[tuple[str, str]]:
    """Yields (rule, rewritten gold) for each rule that applies."""
    yield "dollars", f"${gold}$"
    yield "spaces", re.sub(r"([=+<>,])", r" \1 ", gold)
    if r"\text" not in gold:
        yield "display", rf"\displaystyle {gold}"
    yield from _numbers(gold)
    yield from _fractions(gold)
    yield from _symbols(gold)
    yield from _relations(gold)
    yield from _collections(gold)


def _numbers(gold: str) -> Iterator[tuple[str, str]]:
    if re.fullmatch(r"-?\d{1,15}", gold):
        yield "point zero", f"{gold}.0"
        yield "named", f"x = {gold}"
        yield "named behind", f"{gold} = n"
        yield "bold", rf"\mathbf{{{gold}}}"
        yield "approximately", rf"\approx {gold}"
        if abs(int(gold)) >= 1000:
            yield "thousands", f"{int(gold):,}"
            yield "thousands in LaTeX", f"{int(gold):,}".replace(",", "{,}")
        if not gold.startswith("-"):
            yield "unit", rf"{gold}\text{{ apples}}"
            yield "money", rf"\${gold}"
            yield "root", rf"√{int(gold) ** 2}"
            yield "choice", rf"\textbf{{(B)}}\ {gold}"
    if re.fullmatch(r"-?\d+\.\d+", gold):
        whole, _, digits = gold.lstrip("-").partition(".")
        sign = "-" if gold.startswith("-") else ""
        yield "decimal as fraction", rf"{sign}\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}}"
    if gold.endswith(r"^\circ"):
        yield "degree", gold.removesuffix(r"^\circ") + "°"
        yield "degrees", gold.removesuffix(r"^\circ") + r"\text{ degrees}"
    if re.fullmatch(r"\d+(\.\d+)?\\%", gold):
        yield "percent", gold.removesuffix(r"\%") + r"\text{ percent}"


def _fractions(gold: str) -> Iterator[tuple[str, str]]:
    if _FRACTION.search(gold):
        yield "dfrac", re.sub(r"\\d?frac", r"\\dfrac", gold)
        yield "over", _FRACTION.sub(r"{\1 \\over \2}", gold)
        yield "expanded", _FRACTION.sub(lambda f: rf"\frac{{{3 * int(f[1])}}}{{{3 * int(f[2])}}}", gold)
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if match is None or int(match[3]) == 0:
        return
    sign, top, bottom = match[1], int(match[2]), int(match[3])
    yield "slash", f"{sign}{top}/{bottom}"
    yield "shown beside", rf"{gold} \approx {sign}{round(top / bottom, 4)}"
    if top > bottom and top % bottom:
        yield "mixed", rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
        yield "mixed in plain text", f"{sign}{top // bottom} {top % bottom}/{bottom}"
    reduced = bottom
    for factor in (2, 5):
        while reduced % factor == 0:
            reduced //= factor
    if reduced in (3, 9, 11, 33, 99) and bottom == reduced and top < bottom:
        block = f"{top * 99 // bottom:02d}"
        yield "repeating", rf"{sign}0.\overline{{{block}}}"
        yield "repeating with dots", rf"{sign}0.{block * 3}\ldots"
        yield "repeating in brackets", f"{sign}0.({block})"
    elif reduced == 1 and bottom <= 10_000:
        yield "decimal", f"{sign}{top / bottom:.10f}".rstrip("0").rstrip(".")


def _symbols(gold: str) -> Iterator[tuple[str, str]]:
    if re.search(r"\\sqrt\{\d+\}", gold):
        yield "root in Unicode", re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold)
        yield (
            "root of a product",
            re.sub(r"\\sqrt\{(\d+)\}", lambda root: rf"\frac{{\sqrt{{{4 * int(root[1])}}}}}{{2}}", gold),
        )
    if re.search(r"\\pi(?![a-z])", gold):
        yield "letter in Unicode", re.sub(r"\\pi(?![a-z])", "π", gold)
    if re.search(r"\^\{?\d", gold) and r"\circ" not in gold:
        yield (
            "power in Unicode",
            re.sub(
                r"\^(?:\{(\d+)\}|(\d))",
                lambda power: (power[1] or power[2]).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")),
                gold,
            ),
        )
    if r"\infty" in gold:
        yield "infinity in Unicode", gold.replace(r"\infty", "∞")
    if re.search(r"\\(?:sin|cos|tan|ln|log)(?![a-z_])", gold):
        yield "operator names", re.sub(r"\\(sin|cos|tan|ln|log)(?![a-z_])", r"\\operatorname{\1}", gold)
    if r"\begin{pmatrix}" in gold and gold.count(r"\begin") == 1:
        columns = "c" * (gold.partition(r"\\")[0].count("&") + 1)
        yield (
            "array",
            gold.replace(r"\begin{pmatrix}", rf"\left(\begin{{array}}{{{columns}}}").replace(
                r"\end{pmatrix}", r"\end{array}\right)"
            ),
        )
    if re.fullmatch(r"\\text\{\(?[A-E]\)?\}", gold):
        yield "bold choice", re.sub(r".*([A-E]).*", r"\\textbf{(\1)}", gold)
    if r"\text{" in gold:
        yield "mathrm", re.sub(r"\\text\{([A-Za-z]+)\}", r"\\mathrm{\1}", gold)


def _relations(gold: str) -> Iterator[tuple[str, str]]:
    sides = gold.split("=")
    plain = re.search(r"[<>,\\]|text|in\b", gold) is None
    if len(sides) == 2 and re.search("[a-z]", sides[0]) and re.search("[a-z]", sides[1]) and plain:
        yield "sides exchanged", f"{sides[1]}={sides[0]}"
        yield "scaled", f"7({sides[0]})=7({sides[1]})"
        yield "one side", f"3({sides[0]})-3({sides[1]})=0"
    if len(sides) == 2 and re.fullmatch(r"\s*[a-zA-Z]\s*", sides[0]) and re.fullmatch(r"[-\d. ]+", sides[1]):
        yield "without its name", sides[1]


def _collections(gold: str) -> Iterator[tuple[str, str]]:
    if re.fullmatch(r"-?\d{1,3}(?:, ?-?\d{1,3})+", gold) and (", " in gold or not re.search(r"\d,\d{3}(?!\d)", gold)):
        numbers = re.split(r", ?", gold)
        yield "reversed", ", ".join(reversed(numbers))
        yield "full width", "，".join(numbers)
        yield "set", rf"\{{{', '.join(numbers)}\}}"
        yield "membership", rf"x \in \{{{','.join(numbers)}\}}"
        yield "in words", ", ".join(numbers[:-1]) + rf" \text{{ and }} {numbers[-1]}"
    if re.fullmatch(r"\(-?[\d./]+, ?-?[\d./]+\)", gold):
        first, second = gold.strip("()").split(",")
        yield "named pair", f"x={first}, y={second}"
        yield "pair with names", f"(x,y)=({first},{second})"
    unions = re.split(r"\\cup", re.sub(r"\\left|\\right|\s", "", gold))
    intervals = [_INTERVAL.fullmatch(part) for part in unions]
    if all(intervals) and (r"\infty" in gold or r"\cup" in gold or "[" in gold or "]" in gold):
        said = [_inequality(interval) for interval in intervals if interval]
        if all(said):
            yield "inequalities", r" \text{ or } ".join(said)
            yield "backwards", r"x\in " + r" \cup ".join(reversed(unions))


def _inequality(interval: re.Match[str]) -> str:
    opening, left, right, closing = interval.groups()
    low = "" if "infty" in left else left + (r" \le " if opening == "[" else " < ")
    high = "" if "infty" in right else (r" \le " if closing == "]" else " < ") + right
    return f"{low}x{high}" if low or high else ""


def pairs(golds_of_each: int = GOLDS_OF_EACH) -> list[tuple[str, str, str]]:
    """Returns the same (rule, gold, rewritten gold) each time. Only every eighth whole-number gold is used."""
    found: list[tuple[str, str, str]] = []
    rng = random.Random(17)
    for name in SETS:
        with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
            golds = sorted({json.loads(line)["answer"] for line in file})
        golds = [gold for gold in golds if not re.fullmatch(r"-?\d+", gold) or rng.random() < 0.125]
        for gold in rng.sample(golds, min(golds_of_each, len(golds))):
            if "boxed" not in gold and "$" not in gold and gold.count("{") == gold.count("}"):
                found += [(rule, gold, text) for rule, text in rewritings(gold) if text != gold]
    return found


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not on this machine")
def test_rewritten_golds_are_right() -> None:
    verifier = MathVerifier()
    tried, missed = pairs(), []
    for rule, gold, text in tried:
        if verifier(gold, f"\\boxed{{{text}}}")["acc"] != 1:
            missed.append((rule, gold, text))
    share = 1 - len(missed) / len(tried)
    print(f"\n{share:.4f} of {len(tried)}; missed {dict(Counter(rule for rule, _, _ in missed))}")
    assert len(tried) >= 2_000
    assert share >= MIN_SHARE, missed[:20]
