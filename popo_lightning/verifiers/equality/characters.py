r"""Unicode as LaTeX: `2√15` is `2\sqrt 15`, `x¹²` is `x^{12}`, `3½` is `3\frac{1}{2}`, `3、5` is `3, 5`.

Only characters with one meaning in mathematics are rewritten. All others stay, and are not part of any number.
"""

from __future__ import annotations

import re

_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ϵ": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "ϑ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi",
    "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma",
    "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi",
    "\u03a9": "Omega", "\u2126": "Omega",
}  # fmt: skip
_SIGNS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "÷": "div", "∞": "infty", "√": "sqrt", "∛": "sqrt[3]", "∜": "sqrt[4]",
    "≤": "leq", "⩽": "leq", "≥": "geq", "⩾": "geq", "≠": "neq", "∪": "cup", "∩": "cap", "∈": "in", "±": "pm",
    "∓": "mp", "∠": "angle", "∡": "angle", "≅": "cong", "≈": "approx", "≃": "approx", "≡": "equiv", "∅": "emptyset",
    "⌀": "emptyset", "∖": "setminus", "…": "ldots", "⋯": "ldots", "△": "triangle", "⊥": "perp", "∥": "parallel",
    "∼": "sim", "∨": "lor", "∧": "land", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "→": "rightarrow",
    "⟨": "langle", "⟩": "rangle", "∘": "circ",
}  # fmt: skip
_TABLE = str.maketrans(
    {
        **{character: rf"\{name} " for character, name in {**_GREEK, **_SIGNS}.items()},
        **{character: rf"\mathbb{{{letter}}}" for character, letter in zip("ℝℂℚℤℕ", "RCQZN", strict=True)},
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width characters
        **dict.fromkeys("−–‐‑﹣－", "-"),
        **dict.fromkeys("’′", "'"),
        "″": "''", "，": ", ", "、": ", ", "。": ".", "∕": "/", "⁄": "/", "∶": ":", "°": r"^\circ ",
        "￥": "¥", "￡": "£", "𝑒": "e", "ℯ": "e",
    }
)  # fmt: skip
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉ₙ"
_LEVEL = str.maketrans(_RAISED + _LOWERED, "0123456789+-ni" + "0123456789n")
_POWER, _INDEX = re.compile(f"[{_RAISED}]+"), re.compile(f"[{_LOWERED}]+")
_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
    "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_FRACTION = re.compile(f"[{''.join(_FRACTIONS)}]")
_BAR, _DOT = re.compile("((?:[0-9]\u0305)+)"), re.compile("([0-9])\u0307")


def latex_of(text: str) -> str:
    """Replaces mathematical characters outside ASCII by LaTeX. The time is linear in the length of the text."""
    if text.isascii():
        return text
    text = _POWER.sub(lambda found: f"^{{{found[0].translate(_LEVEL)}}}", text)
    text = _INDEX.sub(lambda found: f"_{{{found[0].translate(_LEVEL)}}}", text)
    text = _FRACTION.sub(lambda found: r"\frac{{{}}}{{{}}}".format(*_FRACTIONS[found[0]]), text)
    text = _BAR.sub(lambda found: r"\overline{" + found[1].replace("\u0305", "") + "}", text)
    return _DOT.sub(r"\\dot{\1}", text).translate(_TABLE)
