r"""LaTeX commands with the same meaning, and their numbers of arguments."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.characters import latex_of

DROPPED = frozenset(
    {"$", r"\!", r"\(", r"\)", r"\[", r"\]", r"\left", r"\right", r"\big", r"\Big",
     r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\displaystyle", r"\textstyle", r"\limits", r"\hline",
     r"\rm", r"\boldsymbol", r"\bm", "\\"}
)  # fmt: skip
RENAMED = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\geqslant": r"\geq", r"\ge": r"\geq",
    r"\leqslant": r"\leq", r"\le": r"\leq", r"\ne": r"\neq", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\imath": "i", r"\lvert": "|", r"\rvert": "|", r"\vert": "|",
    r"\mathrm": r"\text", r"\textbf": r"\text", r"\mathbf": r"\text", r"\mbox": r"\text", r"\textnormal": r"\text",
    r"\textrm": r"\text", r"\textsc": r"\text", r"\textit": r"\text", r"\mathit": r"\text", r"\hbox": r"\text",
    r"\textsuperscript": "^", r"\prime": "'", r"\to": r"\rightarrow", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\degree": r"^\circ", r"\degrees": r"^\circ", r"\*": "*", r"\implies": r"\Rightarrow", r"\colon": ":",
    r"\%": "%", r"\;": " ", r"\:": " ", r"\quad": " ", r"\qquad": " ", "~": " ", "\\ ": " ",
    r"\dots": r"\ldots", r"\cdots": r"\ldots", r"\dotsc": r"\ldots", r"\dotsb": r"\ldots", r"\bar": r"\overline",
    r"\simeq": r"\approx", r"\approxeq": r"\approx", r"\thickapprox": r"\approx", r"\varphi": r"\phi",
    r"\varepsilon": r"\epsilon", r"\vartheta": r"\theta", r"\Bbb": r"\mathbb", r"\mathds": r"\mathbb",
    r"\mid": "|", r"\langle": "(", r"\rangle": ")",
    r"\backslash": r"\setminus", r"\smallsetminus": r"\setminus", r"\vee": r"\lor", r"\wedge": r"\land",
    r"\pounds": "£", r"\euro": "€", r"\texteuro": "€", r"\yen": "¥", r"\textdollar": r"\$",
    r"\measuredangle": r"\angle",
    r"\overarc": r"\widehat", r"\wideparen": r"\widehat", r"\arc": r"\widehat", r"\tg": r"\tan", r"\ctg": r"\cot",
    r"\arctg": r"\arctan",
}  # fmt: skip
ARGUMENTS = {r"\frac": 2, r"\sqrt": 1, r"\text": 1, r"\operatorname": 1, r"\binom": 2, "^": 1, "_": 1}
ARGUMENTS |= {r"\overline": 1, r"\dot": 1, r"\widehat": 1}
FUNCTIONS = frozenset(
    "sin cos tan cot csc arcsin arccos arctan sinh cosh tanh ln log exp gcd".split()  # noqa: SIM905
)
OPERATORS = FUNCTIONS | {"sec"}  # in plain text, sec means seconds
INFIX = {r"\over": r"\frac", r"\choose": r"\binom"}
_ENVIRONMENT = re.compile(r"\\begin\s*\{array\}\s*(?:\[[a-z]\]\s*)?\{[^{}]{0,40}\}")
_ARC = re.compile(r"\\(?:overset|stackrel)\s*\{?\s*\\frown\s*\}?")
_REALS = re.compile(r"\\R(?:eals)?(?![A-Za-z])")
_DOLLAR = re.compile(r"(?<!\\)\$(?=\s?[\d.])")
_QUAD = re.compile(r",?\s*\\q?quad\s*(?=[A-Za-z](?:_\w)?\s*=)")
_DOTS = re.compile(r"\.{3,}")


def prepared(text: str) -> str:
    r"""Prepares a text for tokenization: LaTeX for Unicode, `\$` for an unpaired dollar sign before a number."""
    text = latex_of(text).replace("{,}", ",")
    if "..." in text:
        text = _DOTS.sub(r"\\ldots ", text)
    if "$" in text and (text.count("$") - text.count(r"\$")) % 2:  # a pair would enclose mathematics
        text = _DOLLAR.sub(r"\\$", text, count=1)
    if "quad" in text:
        text = _QUAD.sub(", ", text)
    if "\\" in text:
        text = _REALS.sub(r"\\mathbb{R}", _ARC.sub(r"\\widehat ", _ENVIRONMENT.sub(r"\\begin{array}", text)))
    return text


_MATRICES = {"()": "pmatrix", "[]": "bmatrix", "||": "vmatrix"}
_MATRIX = re.compile(
    r"([(\[|])\\begin\{(array|(?:small)?matrix)\}((?:(?!\\begin|\\end).)*)\\end\{\2\}([)\]|])", re.DOTALL
)


_BASE = re.compile(r"(?<=\d)\\text\{\(?(?:in)?base ?(\d{1,2})\)?\}")
_BRACKETED = re.compile(r"^\((\d+)\)_(?=[\d{])")
_CASES = re.compile(r"\\begin\{cases\}([^&]*)\\end\{cases\}", re.DOTALL)


def tidied(text: str) -> str:
    """Unifies the spelling of forms with several tokens: matrices, the base of a number, the empty set."""
    if r"\end" in text:
        text = _MATRIX.sub(_matrix, text)
        text = re.sub(r"\\\\(?=\\end)", "", text)
        cases = _CASES.fullmatch(text)
        if cases:
            text = ",".join(part.strip(",") for part in cases[1].split(r"\\"))
    if ")_" in text:
        text = _BRACKETED.sub(r"\1_", text)
    if "base" in text:
        text = _BASE.sub(lambda base: "_" + (base[1] if len(base[1]) == 1 else f"{{{base[1]}}}"), text)
    return text.replace(r"\{\}", r"\emptyset") if r"\{\}" in text else text


def _matrix(match: re.Match[str]) -> str:
    kind = _MATRICES.get(match[1] + match[4])
    return rf"\begin{{{kind}}}{match[3]}\end{{{kind}}}" if kind else match[0]
