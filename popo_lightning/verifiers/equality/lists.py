r"""Several required values: `1,-2`, `1 and -2`, `\{1,-2\}`, `1\pm2`, `\text{A and C}`."""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.latex import brackets, parts

_WORD_LIST = re.compile(r"\\text\{(?:,?(?:and|or|OR|AND)|,)\}|(?<=[\d})])(?:and|or)(?=[\d\\({-])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")  # 100,000\pi is not a list
_WORDS_IN_TEXT = re.compile(r"\\text\{(\(?\w+\)?(?:(?:,| and | or |,and |,or )\(?\w+\)?){1,8})\}", re.ASCII)


def elements(text: str) -> list[str]:
    r"""Returns the elements of a set or list, with both values of `\pm`; one element for anything else."""
    words = _WORDS_IN_TEXT.fullmatch(text)
    if words is not None:
        return [rf"\text{{{word}}}" for word in re.split(r",? ?\b(?:and|or)\b ?|,", words[1]) if word]
    inner = brackets(text)
    if inner is not None and inner[0] == r"\{" and inner[1] != r"\emptyset":
        text = inner[1]
    elif inner is None:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    found = [part for part in parts(_WORD_LIST.sub(",", text), "[,;]") if part]
    spelled: list[str] = []
    for part in found:
        if part.count(r"\pm") == 1 and r"\mp" not in part:
            spelled += [re.sub(r"\\pm ?", sign, part) for sign in "+-"]
        else:
            spelled.append(part)
    return [part.removeprefix("+") for part in spelled]
