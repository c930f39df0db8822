"""Hooks of mkdocs: they choose the pages, render formulas, and write an API reference page per folder of the package.

A page keeps the path that it has in the repository, so that its links are valid in both places. Files that pages link
to, such as pictures and scripts, are copied beside them. See mkdocs.yml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "popo_lightning"
SINGLE_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGE_FOLDERS = ("docs", "benchmarks", "examples")
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")  # neither another host nor an anchor of the same page
REFERENCE = "reference"
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def pages() -> list[str]:
    """Paths of all pages in the repository."""
    inside = [path for folder in PAGE_FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))]
    single = [ROOT / name for name in SINGLE_PAGES]
    return [path.relative_to(ROOT).as_posix() for path in (*single, *inside) if path.is_file()]


def linked(page: str) -> Iterator[str]:
    """Paths of the repository's files that a page links to."""
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent.joinpath(target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path.relative_to(ROOT).as_posix()


def rooms() -> dict[str, list[str]]:
    """Modules to document, by page: one for each room, one for each command's folder, and one for the files beside."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if not path.stem.startswith("_"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            deep = 3 if parts[1] == "cli" and len(parts) > 3 else 2
            found.setdefault(".".join(parts[1:deep]) if len(parts) > 2 else PACKAGE, []).append(".".join(parts))
    return found


def reference(room: str, modules: list[str]) -> str:
    """Markdown of one page of the reference."""
    head = ROOT / PACKAGE / ("" if room == PACKAGE else room.replace(".", "/")) / "__init__.py"
    about = f"::: {PACKAGE if room == PACKAGE else f'{PACKAGE}.{room}'}\n    options: {{members: false}}\n"
    body = "\n".join(f"::: {module}\n" for module in modules)
    return f"# {room}\n\n{about if head.is_file() else ''}\n{body}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces the folders that the navigation names by their pages."""
    hidden = config.not_in_nav
    shown = [page for page in pages() if not (hidden and hidden.match_file(page))]
    shown += [f"{REFERENCE}/{room}.md" for room in rooms()]
    config.nav = expanded(config.nav, by_entry(shown, set(entries(config.nav))))
    beside = [ROOT / name for name in (*SINGLE_PAGES, *PAGE_FOLDERS, PACKAGE)]
    config.watch += [str(path) for path in beside if path.exists()]  # mkdocs serve shows their changes
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the repository's pages, the files that they link to, and the reference."""
    theirs = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    found = pages()
    paths = dict.fromkeys([*found, *(target for page in found for target in linked(page))])
    ours = [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths]
    made = [File.generated(config, f"{REFERENCE}/{name}.md", content=reference(name, m)) for name, m in rooms().items()]
    return Files([*theirs, *ours, *made])


def on_page_content(html: str, **kwargs: Any) -> str:
    """Renders formulas as MathML, which browsers show without a script."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    return convert(unescape(found[2]), display="block" if found[1] == "div" else "inline")


def entries(nav: Any) -> Iterator[str]:
    """Yields the pages and folders that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(one)


def by_entry(shown: list[str], named: set[str]) -> dict[str, list[str]]:
    """The pages that each entry stands for: those that no narrower entry has, with a README first."""
    found: dict[str, list[str]] = {}
    for page in sorted(shown, key=lambda page: (Path(page).stem != "README", page)):
        holders = [entry for entry in named if page == entry or (entry.endswith("/") and page.startswith(entry))]
        if holders:
            found.setdefault(max(holders, key=len), []).append(page)
    return found


def expanded(nav: Any, pages_of: dict[str, list[str]]) -> Any:
    """A navigation whose folders are lists of pages, without those that are empty."""
    if isinstance(nav, dict):
        return {title: expanded(one, pages_of) for title, one in nav.items()}
    if isinstance(nav, str):
        return pages_of.get(nav, []) if nav.endswith("/") else nav
    found: list[Any] = []
    for one in nav:
        new = expanded(one, pages_of)
        if isinstance(one, str) and one.endswith("/"):
            found.extend(new)
        elif not isinstance(new, dict) or all(new.values()):
            found.append(new)
    return found
