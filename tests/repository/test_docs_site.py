"""The documentation: links work in the repository and on the site, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.places import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
TOOLS = {
    "mkdocs": "mkdocs",
    "material": "mkdocs-material",
    "mkdocstrings": "mkdocstrings",
    "latex2mathml": "latex2mathml",
}


def slugs(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.*?) *$", CODE.sub(lambda found: found[0].replace("#", ""), page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue  # another host
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.is_file() or (anchor and anchor not in slugs(file)):
            found.append(f"{page.name}: {link}")
    return found


@pytest.mark.slow
def test_links_lead_to_files() -> None:
    """Links must lead to files, because a folder is a page on GitHub but not on the site."""
    assert len(PAGES) > 50
    assert [link for page in PAGES for link in broken_links(page)] == []


@pytest.mark.slow
def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "folder").mkdir()
    page.write_text(
        "# What's `a_b`, here?\n[a](page.md) [b](#whats-a_b-here) [c](https://x.org/y) `[d](e)`\n"
        "```\n[f](g)\n# h\n```\n[i](j.md) [k](#l) [m](page.md#h) [n](folder)\n"
    )
    assert broken_links(page) == ["page.md: j.md", "page.md: #l", "page.md: page.md#h", "page.md: folder"]


def needs_the_tools() -> None:
    missing = [name for module, name in TOOLS.items() if find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[docs]'")


@pytest.mark.slow
def test_a_folder_of_the_navigation_is_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_the_tools()
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    from docs_site import by_entry, entries, expanded

    nav = ["README.md", {"A": ["a/one.md", "a/"]}, {"B": "a/b/"}, {"C": "c/"}]
    assert list(entries(nav)) == ["README.md", "a/one.md", "a/", "a/b/", "c/"]
    shown = ["README.md", "a/two.md", "a/one.md", "a/README.md", "a/b/three.md", "d/four.md"]
    found = expanded(nav, by_entry(shown, set(entries(nav))))
    assert found == ["README.md", {"A": ["a/one.md", "a/README.md", "a/two.md"]}, {"B": ["a/b/three.md"]}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_the_tools()
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # formats signatures
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_on_the_site(site: Path) -> None:
    for page in PAGES:
        relative = page.relative_to(REPOSITORY)
        assert (
            (site / relative.parent / ("index" if page.stem == "README" else page.stem)).with_suffix(".html").is_file()
        )


@pytest.mark.slow
def test_every_room_has_a_reference(site: Path) -> None:
    rooms = {path.parent for path in (REPOSITORY / "popo_lightning").rglob("*.py") if not path.stem.startswith("_")}
    places = [room.relative_to(REPOSITORY / "popo_lightning").parts for room in rooms]
    names = {".".join(place[: 2 if place[0] == "cli" else 1]) if place else "popo_lightning" for place in places}
    assert {path.stem for path in (site / "reference").glob("*.html")} == names and "cli.estimate" in names
    text = (site / "reference" / "objectives.html").read_text()
    assert 'id="popo_lightning.objectives.trust_regions.PPOClip"' in text  # a class, with the meaning of its settings
    assert "<code>dual_clip</code>" in re.sub(r"<(\w+)[^>]*>", r"<\1>", text).replace("<strong><code>", "<code>")


@pytest.mark.slow
def test_pictures_and_formulas_are_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for picture in re.findall(r'<img[^>]* src="([^"]+)"', text):
            assert picture.startswith(("http", "data:")) or (page.parent / picture).is_file(), (page, picture)
        assert "arithmatex" not in text, page
    assert "<math" in (site / "docs" / "methods" / "popo.html").read_text()
