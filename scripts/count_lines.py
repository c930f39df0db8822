"""Counts the lines of the package by room: statements, docstrings, comments and blank lines.

Usage: python scripts/count_lines.py
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "popo_lightning"
KINDS = ("code", "docstrings", "comments", "blank")


def main() -> None:
    """Prints a table, the largest room first."""
    rooms: dict[str, Counter[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        rooms.setdefault(f"{parts[0]}/" if len(parts) > 1 else "ground floor", Counter()).update(lines_of(path))
    total = sum(rooms.values(), Counter[str]())
    print(f"| room | {' | '.join(KINDS)} |\n| --- |{' ---: |' * len(KINDS)}")
    for name, found in sorted(rooms.items(), key=lambda each: -each[1]["code"]):
        print(f"| `{name}` | {' | '.join(f'{found[kind]:,}' for kind in KINDS)} |")
    print(f"| all | {' | '.join(f'{total[kind]:,}' for kind in KINDS)} |")


def lines_of(path: Path) -> Counter[str]:
    """Returns the number of lines of each kind in a file."""
    text = path.read_text(encoding="utf-8")
    kinds = ["blank" if not line.strip() else "code" for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            kinds[token.start[0] - 1] = "comments"
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for each in body:  # also the strings behind attributes
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                for line in range(each.lineno - 1, each.end_lineno or each.lineno):
                    kinds[line] = "docstrings"
    return Counter(kinds)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
