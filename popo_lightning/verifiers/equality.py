r"""When an answer is the gold answer: spelling, plain numbers, lists, tuples, assignments, then computer algebra.

- Equal spelling is right, whatever it says. Words may differ in case.
- Where both are plain numbers the numbers decide (see `numbers`).
- `1,-2` is a set: order does not matter, every element must be there. So are `1 and -2`, `\{1,-2\}` and `1\pm2`.
  `(1,-2)` keeps its order, and its brackets, which may be an interval's.
- `x=5` is 5, on either side, where the name is a short one; two names must be the same. No other equation is a value:
  `5=5` and `2+3=5` are not 5.
- `x>2` is `(2,\infty)`, on either side.
- `\frac{15}{2}=7.5` is 7.5 where each side is written otherwise and is the gold number.
- Units after a number may be missing on one side, but not differ (see `units`). Degrees, dollars and percent signs
  likewise. `70\text{ thousand}` is 70000.
"""

from __future__ import annotations

import re

from popo_lightning.verifiers.latex import brackets, parts, without_commands, without_text_commands
from popo_lightning.verifiers.numbers import numbers_agree, read_number
from popo_lightning.verifiers.ranges import interval_of
from popo_lightning.verifiers.units import split_unit

MAX_ELEMENTS = 80
MAX_NESTING = 4

_NAME = re.compile(
    r"(?:\\text\{[A-Za-z ]+\}|m?(?:\\angle ?)?[A-Za-z]{1,3}|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega|rho|angle))"
    r"(?:\d{1,3})?(?:_(?:\w|\{\w{1,8}\}))?'*(?:\((?:[A-Za-z],?){1,4}\))?",
    re.ASCII,
)
_WORD_LIST = re.compile(r"\\text\{,?(?:and|or|OR|AND)\}|(?<=[\d})])(?:and|or)(?=[\d\\({-])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")  # 100,000\pi is no list
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)|\.){0,2}")


def same_answer(gold: str, answer: str, nesting: int = 0) -> bool:
    """Whether an answer, in canonical LaTeX as the gold, is right."""
    if not answer or not gold:
        return False
    if _spelled_alike(gold, answer):
        return True
    one, other = read_number(gold), read_number(answer)
    if one is not None and other is not None:
        return numbers_agree(one, other)
    if nesting > MAX_NESTING:
        return False
    for rule in (_unpacked, _restated, _ranged, _assigned, _listed, _bracketed, _united, _measured):
        verdict = rule(gold, answer, nesting + 1)
        if verdict is not None:
            return verdict
    from popo_lightning.verifiers.symbolic import meets_decimal, symbolically_equal  # loaded when the worker started

    if one is not None and one.half_unit:
        return meets_decimal(one, answer)
    return symbolically_equal(gold, answer)


def _spelled_alike(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    if re.search(r"\d \d", gold + answer):  # 5 5 is not 55
        return False
    one, other = without_text_commands(gold), without_text_commands(answer)
    choices = _CHOICE.fullmatch(one), _CHOICE.fullmatch(other)
    if choices[0] and choices[1]:
        return choices[0][1] == choices[1][1]
    if one == other:
        return bool(one)
    return re.fullmatch(r"[A-Za-z]{2,}", one) is not None and one.casefold() == other.casefold()


def _unpacked(gold: str, answer: str, nesting: int) -> bool | None:
    """Without brackets around all of a single value."""
    plain = [_without_brackets(text) for text in (gold, answer)]
    return same_answer(plain[0], plain[1], nesting) if plain != [gold, answer] else None


def _without_brackets(text: str) -> str:
    if text.startswith(r"\text{") and re.search(r"\d", text) and not re.search(r"[A-Za-z]{2}", without_commands(text)):
        inner = brackets(text.removeprefix(r"\text"))  # bold numbers
        return text if inner is None else inner[1]
    inner = brackets(text)
    if inner is None or inner[0] not in "({" or len(parts(inner[1], ",")) > 1:
        return text
    return inner[1] if inner[0] + inner[2] in ("()", "{}") else text


def _restated(gold: str, answer: str, nesting: int) -> bool | None:
    r"""An answer such as `\frac{15}{2}=7.5`: one number in several spellings; None for anything else."""
    sides = parts(answer, "=")
    one, others = read_number(gold), [read_number(side) for side in sides]
    if one is None or len(sides) < 2 or len(set(sides)) < len(sides) or None in others:
        return None
    return all(other is not None and numbers_agree(one, other) for other in others)


def _ranged(gold: str, answer: str, nesting: int) -> bool | None:
    r"""An interval, as `(2,3)` or `x\in(2,3)`, and an inequality of that name; None for anything else."""
    for text, other, turned in ((answer, gold, False), (gold, answer, True)):
        read = interval_of(text)
        name, value = _assignment(other)
        inner = brackets(value)
        if read is None or name not in (None, read[0]) or inner is None or inner[0] not in "([":
            continue
        return same_answer(read[1], value, nesting) if turned else same_answer(value, read[1], nesting)
    return None


def _assigned(gold: str, answer: str, nesting: int) -> bool | None:
    """Assignments by their values; None where neither side is one."""
    if len(_elements(gold)) > 1 or len(_elements(answer)) > 1:
        return None
    named, value = _assignment(gold)
    also_named, answered = _assignment(answer)
    if named is not None and also_named is not None:
        return same_answer(value, answered, nesting) if named == also_named else False
    if named is not None and not _is_relation(answer):
        return same_answer(value, answer, nesting)
    if also_named is not None and not _is_relation(gold):
        return same_answer(gold, answered, nesting)
    return None


def _assignment(text: str) -> tuple[str | None, str]:
    r"""(name, value) of `x=5` and `x\in[0,1]`, (None, text) of anything else."""
    for sign in ("=", r"\\in"):
        sides = parts(text, sign)
        if len(sides) == 2 and all(sides) and (_NAME.fullmatch(sides[0]) or _names_a_tuple(*sides)):
            return sides[0].replace(" ", ""), sides[1]
    return None, text


def _names_a_tuple(names: str, values: str) -> bool:
    """Whether the text before the sign of `(x,y)=(2,3)` names each value after it."""
    inner = brackets(values)
    named = re.fullmatch(r"\([A-Za-z](?:,[A-Za-z]){1,4}\)", names)
    return named is not None and inner is not None and names.count(",") == len(parts(inner[1], ",")) - 1


def _is_relation(text: str) -> bool:
    return re.search(r"[=<>]|\\leq|\\geq|\\neq|\\in(?![A-Za-z])|\\equiv|\\cong", text) is not None


def _elements(text: str) -> list[str]:
    r"""The elements of a set or list, `\pm` spelled out; one element for anything else."""
    inner = brackets(text)
    if inner is not None and inner[0] == r"\{":
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


def _listed(gold: str, answer: str, nesting: int) -> bool | None:
    wanted, given = _elements(gold), _elements(answer)
    if max(len(wanted), len(given)) < 2:
        if [gold, answer] == [*wanted, *given] or not (wanted and given):
            return None
        return same_answer(wanted[0], given[0], nesting)
    if len(wanted) != len(given) or len(wanted) > MAX_ELEMENTS:
        return False
    return _matched(wanted, given, nesting)


def _matched(wanted: list[str], given: list[str], nesting: int) -> bool:
    """Whether each wanted element is given once, whatever the order; those spelled alike are paired first."""
    left = list(given)
    rest = []
    for element in wanted:
        if element in left:
            left.remove(element)
        else:
            rest.append(element)
    for element in rest:
        found = next((other for other in left if same_answer(element, other, nesting)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _bracketed(gold: str, answer: str, nesting: int) -> bool | None:
    """Tuples and intervals, and unions of them."""
    unions = parts(gold, r"\\cup"), parts(answer, r"\\cup")
    if len(unions[0]) == len(unions[1]) > 1:
        return _matched(*unions, nesting)
    one, other = brackets(gold), brackets(answer)
    if one is None or other is None:
        return None
    wanted, given = parts(one[1], ","), parts(other[1], ",")
    if max(len(wanted), len(given)) < 2:
        return None
    if (one[0], one[2]) != (other[0], other[2]) or len(wanted) != len(given) or len(wanted) > MAX_ELEMENTS:
        return False
    return all(same_answer(a, b, nesting) for a, b in zip(wanted, given, strict=True))


def _united(gold: str, answer: str, nesting: int) -> bool | None:
    """Values with units or scales; None where neither side has one."""
    value, unit = split_unit(gold)
    given, given_unit = split_unit(answer)
    if (value, given) == (gold, answer):
        return None
    if unit and given_unit and unit != given_unit:
        return False
    return same_answer(value, given, nesting)


def _measured(gold: str, answer: str, nesting: int) -> bool | None:
    r"""A gold that states a letter-free equation, such as `2\cdot\binom{30}{15}=310235040`, by its right side."""
    sides = parts(gold, "=")
    if len(sides) == 2 and all(sides) and not re.search(r"[A-Za-z]", without_commands(gold)):
        return None if "=" in answer else same_answer(sides[1], answer, nesting)
    return None
