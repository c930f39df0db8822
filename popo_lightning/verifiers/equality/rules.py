r"""Rules by which an answer equals the gold: spelling, plain numbers, lists, tuples, assignments, computer algebra.

- Equal spelling is always correct. Words may differ in case.
- If both are plain numbers, the numbers decide (see `numbers`).
- `1,-2` is a set: order does not matter, but every element is required. So are `1 and -2`, `\{1,-2\}`, `1\pm2` and
  `x\in\{1,-2\}`. `7, 100` is a list and `7,100` a number. `(1,-2)` keeps its order and its brackets, which may be an
  interval's; `x=1,y=-2` is that pair.
- `x=5` and `5=x` are 5, in gold and answer, if the name is short or part of a figure; two names must be the same. No
  other equation is a value: `5=5` and `2+3=5` are not 5. An equation or inequality may be multiplied by a constant.
- `x>2` is `(2,\infty)`, in gold and answer, and `x<0\text{ or }x>2` is a union (see `regions`).
- The answer `\frac{15}{2}=7.5` is 7.5 if its sides differ in spelling and each is the gold number.
  `\frac{2}{3}\approx0.667` equals both two thirds and the gold 0.667; `0.667` alone is not two thirds.
- Units after a number may be missing in gold or answer, but not differ (see `units`). The same holds for degrees,
  currencies and percent signs. `70\text{ thousand}` is 70000.
- `\textbf{(C)}\ 14` is both 14 and C.
- `ABC` is not `BAC`, and `IX` is not `XI`. `BA` is `AB`, a segment.
"""

from __future__ import annotations

import re

from popo_lightning.verifiers.equality.approximations import approximated
from popo_lightning.verifiers.equality.latex import brackets, has_letters, parts, without_text_commands
from popo_lightning.verifiers.equality.lists import elements
from popo_lightning.verifiers.equality.names import (
    assignment,
    named_set,
    named_values,
    of_one_letter,
    tuple_names,
)
from popo_lightning.verifiers.equality.numbers import numbers_agree, open_end, read_number
from popo_lightning.verifiers.equality.regions import region_of
from popo_lightning.verifiers.equality.spelling import choice_letter, choice_with_text, spelled_alike, without_brackets
from popo_lightning.verifiers.equality.unit_names import units_agree
from popo_lightning.verifiers.equality.units import split_unit

MAX_ELEMENTS = 80
MAX_NESTING = 4

_CAPITALS = re.compile("[A-Z]{2,}", re.ASCII)
_ROMAN = re.compile("[IVXLCDM]+")


def same_answer(gold: str, answer: str, nesting: int = 0) -> bool:
    """Returns whether an answer is correct. Gold and answer are in canonical LaTeX."""
    if not answer or not gold:
        return False
    if gold == answer:
        return True
    one, other = read_number(gold), read_number(answer)
    if one is not None and other is not None and (numbers_agree(one, other) or r"\ldots" not in gold + answer):
        return numbers_agree(one, other)
    if spelled_alike(gold, answer):
        return True
    if nesting > MAX_NESTING:
        return False
    for rule in _RULES:
        verdict = rule(gold, answer, nesting + 1)
        if verdict is not None:
            return verdict
    from popo_lightning.verifiers.equality.symbolic import (  # loaded when the worker started
        meets_decimal,
        symbolically_equal,
    )

    if one is not None and one.half_unit:
        return meets_decimal(one, answer)
    return symbolically_equal(gold, answer)


def _unpacked(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares single values without brackets around them; None if there are none."""
    plain = [without_brackets(text) for text in (gold, answer)]
    return same_answer(plain[0], plain[1], nesting) if plain != [gold, answer] else None


def _restated(gold: str, answer: str, nesting: int) -> bool | None:
    r"""Compares an answer such as `\frac{15}{2}=7.5`, one number in several spellings; None for anything else."""
    sides = parts(answer, "=")
    one, others = read_number(gold), [read_number(side) for side in sides]
    if one is None or len(sides) < 2 or len(set(sides)) < len(sides) or None in others:
        return None
    return all(other is not None and numbers_agree(one, other) for other in others)


def _approximated(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares values with approximations, which must be correct. An exact gold needs the exact side."""
    wanted, given = approximated(gold), approximated(answer)
    if wanted is None and given is None:
        return None
    if given is not None and len(given) > 1 and not _one_value(given):
        return False
    first, *others = given or [answer]
    for side in wanted or [gold]:
        number = read_number(split_unit(side)[0])
        decimals = others if number is not None and number.half_unit else []
        if any(same_answer(side, text, nesting) for text in (first, *decimals)):
            return True
    return False


def _one_value(sides: list[str]) -> bool:
    """Returns whether each side of an answer equals the first within one unit of its own last digit."""
    from popo_lightning.verifiers.equality.symbolic import value_of

    first, *others = [split_unit(assignment(side)[1])[0] for side in sides]
    exact = value_of(first)
    for other in others:
        number = read_number(other)
        if exact is None or number is None or abs(number.value - exact) >= (2 * number.half_unit or 1):
            return False
    return True


def _open_ended(gold: str, answer: str, nesting: int) -> bool | None:
    r"""Compares a decimal such as `614.519\ldots`, without visible repetition, by its digits, only with decimals."""
    wanted, given = open_end(gold), open_end(answer)
    if wanted is None and given is None:
        return None
    number = read_number(split_unit(wanted or gold)[0])
    if number is None or not number.half_unit:
        return None
    return same_answer(wanted or gold, given or answer, nesting)


def _chosen(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares a choice letter with its text; None if neither side has both."""
    wanted, given = choice_with_text(gold), choice_with_text(answer)
    if wanted and given:
        return wanted[0] == given[0] and same_answer(wanted[1], given[1], nesting)
    if wanted:
        return (
            choice_letter(without_text_commands(answer)) == wanted[0] or same_answer(wanted[1], answer, nesting) or None
        )
    if given:
        letter = choice_letter(without_text_commands(gold))
        return letter == given[0] if letter else same_answer(gold, given[1], nesting) or None
    return None


def _ranged(gold: str, answer: str, nesting: int) -> bool | None:
    r"""Compares inequalities, `x\neq2`, `\mathbb R` and unions as intervals; None if both are written as intervals."""
    wanted, given = region_of(gold), region_of(answer)
    if wanted is None or given is None or (wanted.plain and given.plain):
        return None
    if wanted.name and given.name and wanted.name != given.name:
        return False
    return len(wanted.pieces) == len(given.pieces) and _matched([*wanted.pieces], [*given.pieces], nesting)


def _belonging(gold: str, answer: str, nesting: int) -> bool | None:
    r"""Compares the set of `k\in\{4,5\}` or `S=\{0,1\}` with a set or list; None for anything else."""
    sets = named_set(gold), named_set(answer)
    names = {named[0] for named in sets if named} - {None}
    if not names:
        return None
    if sets[0] and sets[1]:
        return len(names) == 1 and same_answer(sets[0][1], sets[1][1], nesting)
    text = answer if sets[0] else gold
    listed = {assignment(element)[0] for element in elements(text)} - {None}
    if (_is_relation(text) and not listed) or not listed <= names:
        return False if listed else None
    wanted, given = (named[1] if named else text for named in sets)
    return same_answer(wanted, given, nesting)


def _paired(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares `x=1,y=2`, as a pair in the order of the names, with a tuple or list; None for anything else."""
    wanted, given = named_values(elements(gold)), named_values(elements(answer))
    if (wanted is None) == (given is None):
        return None
    text = answer if wanted else gold
    if brackets(assignment(text)[1]) is None and (given or of_one_letter(elements(gold))):
        return None  # the values have no order
    read = named_values([f"{name}={value}" for name, value in tuple_names(text)])
    other = read[1] if read else assignment(text)[1]
    inner = brackets(other)
    if inner is None and len(parts(other, ",")) > 1:
        other = f"({other})"
    pair = wanted or given
    assert pair is not None
    return same_answer(pair[1], other, nesting) if wanted else same_answer(other, pair[1], nesting)


def _assigned(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares assignments by their values; None if neither side is one."""
    if len(elements(gold)) > 1 or len(elements(answer)) > 1:
        return None
    named, value = assignment(gold)
    also_named, answered = assignment(answer)
    if named is not None and also_named is not None:
        if named != also_named and has_letters(value) and has_letters(answered):
            return None  # such as y=x/3 and x=3y
        return same_answer(value, answered, nesting) if named == also_named else False
    if named is not None and not _is_relation(answer):
        return same_answer(value, answer, nesting)
    if also_named is not None and not _is_relation(gold):
        return same_answer(gold, answered, nesting)
    return None


def _is_relation(text: str) -> bool:
    return re.search(r"[=<>]|\\leq|\\geq|\\neq|\\in(?![A-Za-z])|\\equiv|\\cong", text) is not None


def _listed(gold: str, answer: str, nesting: int) -> bool | None:
    wanted, given = elements(gold), elements(answer)
    if max(len(wanted), len(given)) < 2:
        if [gold, answer] == [*wanted, *given] or not (wanted and given):
            return None
        return same_answer(wanted[0], given[0], nesting)
    if len(wanted) != len(given) or len(wanted) > MAX_ELEMENTS:
        return False
    return _matched(wanted, given, nesting)


def _matched(wanted: list[str], given: list[str], nesting: int) -> bool:
    """Returns whether each wanted element is given once, in any order. Equal spellings are paired first."""
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
    """Compares tuples, intervals, and unions of them."""
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
    """Compares values with units or scales; None if neither side has one."""
    value, unit = split_unit(gold)
    given, given_unit = split_unit(answer)
    if (value, given) == (gold, answer):
        return None
    if not units_agree(unit, given_unit) or (unit and given.endswith("%")) or (given_unit and value.endswith("%")):
        return False
    return same_answer(value, given, nesting)


def _measured(gold: str, answer: str, nesting: int) -> bool | None:
    r"""Compares the right side of a gold that is an equation without letters, `2\cdot\binom{30}{15}=310235040`."""
    sides = parts(gold, "=")
    if len(sides) == 2 and all(sides) and not has_letters(gold):
        return None if "=" in answer else same_answer(sides[1], answer, nesting)
    return None


def _named_by_capitals(gold: str, answer: str, nesting: int) -> bool | None:
    """Compares different words in capitals: an order such as BAC, a Roman numeral, or the two ends of a segment.

    Computer algebra would read them as products, whose factors have no order.
    """
    if not (_CAPITALS.fullmatch(gold) and _CAPITALS.fullmatch(answer)):
        return None
    return len(gold) == 2 and gold == answer[::-1] and not _ROMAN.fullmatch(gold)


_RULES = (
    _unpacked,
    _named_by_capitals,
    _chosen,
    _approximated,
    _open_ended,
    _restated,
    _ranged,
    _belonging,
    _paired,
    _assigned,
    _listed,
    _bracketed,
    _united,
    _measured,
)
