"""Hostile answers by family, the same for the same seed. Any that runs as code would leave a marker file."""

# ruff: noqa: E501 (the answers read better on one line)

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

EACH = 180


def families(marker: Path, seed: int = 20261121) -> dict[str, list[str]]:
    """Returns distinct answers by family, to be put into a box or between answer tags."""
    makers: dict[str, Callable[[random.Random, Path], Iterator[str]]] = {
        "power towers": _power_towers,
        "big powers of groups": _group_powers,
        "factorials": _factorials,
        "nesting": _nesting,
        "a megabyte": _megabytes,
        "foreign characters": _foreign,
        "code": _code,
        "LaTeX that reads files": _files,
        "broken LaTeX": _broken,
        "not finite": _not_finite,
        "unbalanced": _unbalanced,
        "control characters": _controls,
        "lone surrogates": _surrogates,
        "matrices": _matrices,
        "sets and intervals": _sets,
        "long numbers": _long_numbers,
        "repetition": _repetition,
        "calculus": _calculus,
        "hard algebra": _hard_algebra,
        "units": _units,
        "inequalities": _inequalities,
        "noise": _noise,
    }
    found: dict[str, list[str]] = {}
    for name, maker in makers.items():
        answers = maker(random.Random(f"{seed}/{name}"), marker)
        found[name] = list(dict.fromkeys(next(answers) for _ in range(12 if maker is _megabytes else EACH)))
    return found


def _power_towers(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        base, height = rng.choice(["9", "10", "99", "x", "e", "2", "(x+1)", "\\pi"]), rng.randint(2, 30)
        number = str(rng.randint(2, 99999))
        yield rng.choice(
            [
                base + "".join(f"^{{{number}" for _ in range(height)) + "}" * height,
                "^".join([base] + [number] * height),
                "**".join([base] + [number] * height),
                f"{base}^{{{number}!}}",
                f"{base}^{{10^{{{rng.randint(2, 99)}}}}}",
                f"\\frac{{1}}{{{base}^{{{number}^{{{number}}}}}}}",
                f"{base}^{{{number}}}^{{{number}}}",
            ]
        )


def _group_powers(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        inner, number = rng.choice(["x+1", "a+b+c", "9^{99}", "x+y+z+w", "\\sqrt{2}+\\sqrt{3}"]), rng.randint(40, 9999)
        for _ in range(rng.randint(1, 4)):
            inner = f"({inner})^{{{number}}}"
        yield inner[1:] if rng.random() < 0.1 else inner


def _factorials(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        number = rng.randint(9, 10 ** rng.randint(2, 12))
        yield rng.choice(
            [
                f"{number}!" + "!" * rng.randint(0, 20),
                "(" * 6 + f"{number}" + "!)" * 6,
                f"\\binom{{{number}}}{{{number // 2}}}",
                f"\\binom{{{number}^{{9}}}}{{7}}!",
                f"\\sqrt{{{number}!}}",
                f"\\frac{{{number}!}}{{{number - 1}!+1}}",
                f"\\log({number}!)",
            ]
        )


def _nesting(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        opening, closing = rng.choice(
            [
                ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("(", ")"), ("{", "}"), ("[", "]"), ("\\{", "\\}"), ("\\sin(", ")"),
                ("\\left(", "\\right)"), ("x^{", "}"), ("-(", ")"), ("\\text{", "}"), ("|", "|"), ("\\boxed{", "}"),
                ("\\frac{", "}{x}"), ("\\sqrt[3]{", "}"), ("\\log_{", "}"), ("1+(", ")"), ("<answer>", "</answer>"),
            ]
        )  # fmt: skip
        depth = rng.choice([8, 11, 13, 20, 30, 60, 120, 300, 900, 5000])
        yield opening * depth + rng.choice("x79") + "+1" * rng.randint(1, 2) + closing * depth


def _megabytes(rng: random.Random, _: Path) -> Iterator[str]:
    for unit in ["9", "{", "(", "\\frac", "1+", "x^", ",", " ", "\\sqrt{", "\\text{a}", "\\boxed{", "<answer>"]:
        yield (unit * (900_000 // len(unit) + 1))[:900_000]


def _foreign(rng: random.Random, _: Path) -> Iterator[str]:
    digits = ["٥", "५", "５", "𝟓", "⑤", "⁵", "೫", "五", "Ⅴ", "½", "٫", "，", "＋", "∕", "❺", "\u200b5", "5\u0301"]
    while True:
        yield "".join(rng.choice(digits) for _ in range(rng.randint(1, 12)))


def _code(rng: random.Random, marker: Path) -> Iterator[str]:
    write = [f"__import__('os').system('touch {marker}')", f"open('{marker}','w')", f"exec(\"open('{marker}','w')\")"]
    wraps = [
        "{}", "1+{}", "({})", "\\text{{{}}}", "x={}", "lambda x:{}", "[{} for x in (1,)]", "f'{{{}}}'", "\\sqrt{{{}}}", "{};2",
        "{}\n", "5 if {} else 5", "sympify(\"{}\")", "(44+19+35) or {}", "eval(\"{}\")", "\\operatorname{{{}}}", "0 and {}",
        "().__class__.__base__.__subclasses__() or {}", "$({})", "`touch x`{}", "N({})", "import os;{}", "{{{{{}}}}}",
    ]  # fmt: skip
    while True:
        yield rng.choice(wraps).format(rng.choice(write)) + " " * rng.randint(0, 3) + "+0" * rng.randint(0, 3)


def _files(rng: random.Random, marker: Path) -> Iterator[str]:
    while True:
        command = rng.choice(
            ["input", "include", "openin", "openout", "write18", "immediate\\write18", "catcode", "csname"]
        )
        path = rng.choice(["/etc/passwd", str(marker), "../../x", "|touch " + str(marker), "/dev/zero", "/dev/random"])
        yield (
            f"\\{command}{{{path}}}"
            + rng.choice(["", "5", "\\def\\x{\\x\\x}\\x", "\\loop\\repeat"])
            + "x" * rng.randint(1, 6)
        )


def _broken(rng: random.Random, _: Path) -> Iterator[str]:
    pieces = ["\\frac", "\\sqrt", "\\left", "\\right", "^", "_", "{", "}", "\\", "&", "\\\\", "\\begin{pmatrix}", "\\binom",
              "\\end{cases}", "\\sqrt[", "]", "\\pm", "\\cup", "\\in", "=", "<", ",", "|", "\\lfloor", "\\log_", "1/", "!"]  # fmt: skip
    while True:
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(2, 25)))


def _not_finite(rng: random.Random, _: Path) -> Iterator[str]:
    words = ["nan", "NaN", "inf", "-inf", "Infinity", "\\infty", "1e999", "-1e999", "1e-999", "1/0", "\\frac{1}{0}", "zoo", "oo",
             "0/0", "\\frac{0}{0}", "\\infty-\\infty", "\\tan(\\pi/2)", "\\log(0)", "0^{-1}", "1e400", "\\frac{x}{x-x}"]  # fmt: skip
    while True:
        yield rng.choice(words) + rng.choice("+-*/^,= ") + rng.choice(words) + rng.choice(["", "!", "^2", "\\%", "_3"])


def _unbalanced(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        yield "".join(rng.choice("{}()[]{}5x+,") for _ in range(rng.randint(3, 60))) + rng.choice(["{", "(", "}", "]"])


def _controls(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        yield (
            "".join(rng.choice("\x00\x01\x07\x08\x1b\x7f\x85\u2028\u202e\ufeff5x+") for _ in range(rng.randint(3, 40)))
            + "\x00"
        )


def _surrogates(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        yield "".join(rng.choice("\ud800\udfff\udc80\U0010ffff5x+^") for _ in range(rng.randint(3, 40))) + "\udfff"


def _matrices(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        rows, columns = rng.randint(1, 40), rng.randint(1, 40)
        entry = rng.choice(["x", "9^{99}", "\\frac{1}{3}", "a+b", "\\sqrt{2}"])
        kind = rng.choice(["pmatrix", "bmatrix", "vmatrix", "matrix", "array", "cases"])
        body = " \\\\ ".join(" & ".join([entry] * columns) for _ in range(rows))
        yield f"\\begin{{{kind}}}{body}\\end{{{kind}}}" + rng.choice(["", "^{99}", "^{-1}", "^T", "!"])


def _sets(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        count = rng.choice([3, 10, 30, 79, 300])
        elements = [
            rng.choice(["x", "\\sqrt{2}", "9", "(0,1)", "[1,x]", "\\{1\\}", "\\sin x"]) + f"+{n}" for n in range(count)
        ]
        joined = rng.choice([",", "\\cup", ";", " and ", "\\pm", "=", "<", "\\text{ or }"]).join(elements)
        yield rng.choice(["{}", "\\{{{}\\}}", "({})", "[{})", "x\\in{}"]).format(joined)


def _long_numbers(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        digits = "".join(rng.choice("0123456789") for _ in range(rng.choice([30, 61, 400, 1400, 1990, 4400, 40_000])))
        yield rng.choice(
            ["{}", "-{}", "0.{}", "\\frac{{1}}{{{}}}", "{}^{{2}}", "\\sqrt{{{}}}", "{}e9", "1e{}", "{}!", "{}x"]
        ).format("1" + digits)


def _repetition(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        unit = rng.choice(["1,", "a", "(a+", "\\text{a}", "1 ", "\\$", "x^", "-", "1/", "\\frac", "1,000", "10^", "\\pm1", "=x", "{}",
                           "\\text{and}", ".", "e", "1e", "\\,", "/m", "_1", "'", "!", "(1)", "\\circ", "°", "in "])  # fmt: skip
        yield unit * rng.choice([40, 150, 400, 900, 3000]) + rng.choice(["", "!", "x", "}", "=5"])


def _calculus(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        n = rng.randint(5, 10 ** rng.randint(2, 9))
        yield rng.choice(
            [
                f"\\sum_{{k=1}}^{{{n}}} k^{{{n}}}", f"\\prod_{{k=1}}^{{{n}}} k!", f"\\int_0^{{{n}}} e^{{-x^2}}\\sin(x^{{{n}}})dx",
                f"\\lim_{{x\\to\\infty}} x^{{{n}}}e^{{-x}}", f"\\frac{{d^{{{n}}}}}{{dx^{{{n}}}}} x^x", f"\\det({n})",
                f"\\lfloor 10^{{{n}}}\\pi\\rfloor", f"\\gcd({n}!, {n}^{{{n}}})", f"{n} \\bmod 7", f"\\sin({n}^{{{n}}})",
            ]
        )  # fmt: skip


def _hard_algebra(rng: random.Random, _: Path) -> Iterator[str]:
    """Makes answers that pass the bounds and reach computer algebra."""
    functions = ["\\sin", "\\cos", "\\tan", "\\ln", "\\arcsin", "\\sqrt", "\\exp"]

    def term(depth: int) -> str:
        if depth == 0:
            return rng.choice(["x", "n", "2", "7", "\\pi", "a", "\\frac{3}{7}"])
        kind = rng.randrange(5)
        if kind == 0:
            return f"\\frac{{{term(depth - 1)}}}{{{term(depth - 1)}+1}}"
        if kind == 1:
            return f"({term(depth - 1)}+{term(depth - 1)})^{{{rng.randint(2, 9)}}}"
        if kind == 2:
            return rng.choice(functions) + f"{{({term(depth - 1)})}}"
        return f"({term(depth - 1)}{rng.choice('+-')}{term(depth - 1)})"

    while True:
        yield term(rng.randint(2, 4))


def _units(rng: random.Random, _: Path) -> Iterator[str]:
    words = ["m", "million ", "square ", "per ", "/", "sq", "apples ", "feet", "trillion ", "^2", ". ", "cm"]
    while True:
        number, some = (
            rng.choice(["7919", "9" * 1400, "1e399", "\\pi", "7919^\\circ", "\\frac{17}{3}"]),
            rng.sample(words, 2),
        )
        repeated = "".join(some) * rng.randint(1, 150)
        yield rng.choice(
            [
                f"{number}\\text{{{repeated}}}",
                f"{number}{repeated}",
                number + f"\\text{{{some[0]}}}" * rng.randint(2, 150),
                number + f"\\text{{{some[0]}}}/" * rng.randint(2, 150),
                f"\\text{{{number} {repeated}}}",
                "\\text{" * rng.randint(2, 200) + number + "}" * rng.randint(2, 200),
            ]
        )


def _inequalities(rng: random.Random, _: Path) -> Iterator[str]:
    while True:
        sign, count = rng.choice(["<", ">", "\\le ", "\\ge ", "="]), rng.randint(2, 300)
        side = rng.choice(["x", "1", "(x,y)", "9^{9^9}", "[1,", "\\frac{1}{0}", "7.5", "\\log_", "\\{"])
        yield rng.choice(
            [f"{side}{sign}" * count, f"{sign}{side}" * count, f"1{sign}" + side * count, f"x{sign}{side}{count}"]
        )


def _noise(rng: random.Random, _: Path) -> Iterator[str]:
    alphabet = [chr(c) for c in range(32, 127)] + ["\\frac", "\\sqrt", "\\pi", "\n", "×", "√", "°"]
    while True:
        yield "".join(rng.choice(alphabet) for _ in range(rng.randint(8, 120)))
