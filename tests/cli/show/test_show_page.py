"""The page of `popo show` in a browser: it renders without errors, filters, is fast, and shows text as text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import Page, needs_browser
from helpers.shown_runs import HOSTILE, make_odd_run, make_run, samples
from PIL import Image

from popo_lightning.cli.show.command import main

pytestmark = needs_browser
COUNT = "document.querySelector('#pager .soft').textContent"
CHOOSE = """(label, value) => {
    const select = document.querySelector(`#filters select[aria-label="${label}"]`);
    select.value = value;
    select.dispatchEvent(new Event('change'));
}"""
CHART = """(() => {
    window.chart = [...document.querySelectorAll('.chart')].find((each) => each.textContent.startsWith('avg@4'));
})()"""
OVER_RESPONSES = """(() => {
    const axis = document.querySelector('.settings select');
    axis.value = 'responses';
    axis.dispatchEvent(new Event('change'));
})()"""
WRITE = """(name, value) => {
    const input = document.querySelector(`#filters input[name=${name}]`);
    input.value = value;
    input.dispatchEvent(new Event('input'));
}"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with Page() as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Page:
    tab.complaints.clear()
    return tab


def made(folder: Path, *runs: Path, options: tuple[str, ...] = ()) -> Path:
    output = folder / "show.html"
    assert main([*map(str, runs), "--output", str(output), *options]) == 0
    return output


def choose(page: Page, label: str, value: str) -> str:
    page.ask(f"({CHOOSE})({label!r}, {value!r})")
    return str(page.ask(COUNT))


def write(page: Page, name: str, value: str, expected: str) -> None:
    page.ask(f"({WRITE})({name!r}, {value!r})")
    page.wait(f"{COUNT} === {expected!r}")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_it_renders_without_complaints(width: int, scheme: str, page: Page, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "popo-seed1"), make_run(tmp_path / "grpo-seed1", "grpo")]
    page.open(made(tmp_path, *runs), width, 900, scheme)
    assert page.ask("document.querySelector('h1').textContent") == "popo and grpo on sums"
    assert page.ask("document.querySelectorAll('.chart path.line').length") > 20
    assert page.ask("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
    paper = page.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 19, 23)"}[scheme]
    shown = page.ask("document.body.innerText")
    for words in ("popo fit --config popo.yaml", "1 min 15 s", "by level", "<i>geometry</i>", "settings differ"):
        assert words in shown, words
    rows = page.ask("[...document.querySelectorAll('#evaluation td:first-child')].map((each) => each.offsetHeight)")
    assert rows and max(rows) < 80, "no name of a run stands a letter a line"
    assert "hidden1" not in page.ask("document.documentElement.outerHTML")
    assert "hidden2" not in page.ask("document.documentElement.outerHTML")
    assert page.complaints == []


def test_values_show_under_the_pointer_and_runs_hide(page: Page, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "popo-seed1"), make_run(tmp_path / "grpo-seed1", "grpo")]
    page.open(made(tmp_path, *runs))
    page.ask(CHART)
    page.ask("window.chart.scrollIntoView()")
    box = page.ask("JSON.parse(JSON.stringify(window.chart.querySelector('svg').getBoundingClientRect()))")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["right"] - 12, y=box["top"] + 50)
    assert page.ask("window.chart.querySelector('.tip').innerText.split('\\n')") == [
        *("iteration 20", "popo-seed1", "0.2", "grpo-seed1", "0.2")
    ]
    lines = "window.chart.querySelectorAll('path.line').length"
    assert page.ask(lines) == 2
    page.ask("document.querySelector('.legend button').click()")
    assert page.ask(lines) == 1 and page.ask(COUNT) == "40 groups, 160 responses"
    page.ask(OVER_RESPONSES)
    assert "responses generated" in page.ask("window.chart.querySelector('svg').textContent")
    assert page.complaints == []


def test_filters(page: Page, tmp_path: Path) -> None:
    page.open(made(tmp_path, make_run(tmp_path / "popo-seed1"), options=("--evaluated", "100")))
    assert page.ask(COUNT) == "40 groups, 160 responses"
    assert choose(page, "outcome", "right").startswith("8 groups"), "g % 5 == 4"
    assert choose(page, "outcome", "wrong").startswith("8 groups"), "g % 5 == 0"
    assert choose(page, "outcome", "mixed").startswith("24 groups")
    assert choose(page, "origin", "replayed").startswith("12 groups")
    assert page.ask("[...document.querySelectorAll('.group .badge.replayed')].length") == 10, "a page of them"
    assert choose(page, "outcome", "any").startswith("20 groups")
    choose(page, "origin", "any")
    write(page, "from", "19", "4 groups, 16 responses")
    write(page, "to", "19", "2 groups, 8 responses")
    write(page, "from", "", "38 groups, 152 responses")
    write(page, "text", "OF GROUP 17", "1 groups, 4 responses")
    assert page.ask("document.querySelector('.group mark').textContent") == "of group 17"
    write(page, "text", "no such words", "0 groups, 0 responses")
    write(page, "text", "", "38 groups, 152 responses")
    write(page, "to", "", "40 groups, 160 responses")
    assert choose(page, "order", "down") and "iteration 20" in page.ask("document.querySelector('.group').innerText")
    assert choose(page, "responses", "evaluated") == "4 groups, 20 responses"
    first = page.ask("document.querySelector('.group').innerText")
    assert "What is 0?" in first and "user" in first and "greedy" in first and "1 of 5 right" in first
    assert page.complaints == []


def test_pages(page: Page, tmp_path: Path) -> None:
    page.open(made(tmp_path, make_run(tmp_path / "popo-seed1")))
    press = "document.querySelector('#pager [aria-label=\"{}\"]').click()"
    problems = "[...document.querySelectorAll('.group header .mono')].map((each) => each.textContent)"
    assert page.ask(problems) == [f"problem {group}" for group in range(10)]
    page.ask(press.format("next page"))
    assert page.ask(problems)[0] == "problem 10"
    page.ask(press.format("last page"))
    assert page.ask(problems)[-1] == "problem 39" and "page 4 of 4" in page.ask(
        "document.querySelector('#pager').innerText"
    )
    assert page.ask("document.querySelector('#pager [aria-label=\"next page\"]').disabled") is True


def test_hostile_text_stays_text(page: Page, tmp_path: Path) -> None:
    changes = {"response": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "problem": HOSTILE, "failure": HOSTILE}
    changes |= {
        "finish_reason": HOSTILE,
        "parts": {HOSTILE: 1.0, "acc": 0.0},
        "images": [HOSTILE, "javascript:alert(1)"],
    }
    run = make_run(tmp_path / '<b>&amp;"run', rows=samples(1, 0, **changes))
    (run / "run.json").write_text(
        '{"task": "</title><script>window.broken=1</script>", "method": "<b>", "command": "<b>"}'
    )
    output = made(tmp_path, run)
    assert "<img" not in output.read_text() and output.read_text().count("</script>") == 2
    page.open(output)
    shown = page.ask("document.querySelector('.group').textContent")
    assert shown.count('onerror="window.broken=1"><!--<script>') >= 4 and "&lt;b&gt;" in shown
    assert page.ask("window.broken") is None
    assert page.ask("document.querySelectorAll('#page script, #page img, #page b b, main i i').length") == 0
    assert page.ask("document.title").startswith('<b>&amp;"run')
    assert page.complaints == []


def test_odd_values_and_a_run_without_groups_render(page: Page, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", rows=[])
    (bare / "run.json").unlink()
    page.open(made(tmp_path, make_odd_run(tmp_path / "odd"), bare, options=("--evaluated", "10")))
    assert page.ask(COUNT) == "10 groups, 10 responses"
    choose(page, "responses", "any")
    assert page.ask("document.querySelectorAll('.answer').length") == 10 and page.complaints == []


def test_the_policy_lets_no_other_script_run(page: Page, tmp_path: Path) -> None:
    output = made(tmp_path, make_run(tmp_path / "popo-seed1"))
    text = output.read_text()
    output.write_text(
        text.replace(
            '<div id="page">', '<script>window.broken=1</script><img src=x onerror="window.broken=1"><div id="page">'
        )
    )
    page.open(output)
    assert page.ask("document.querySelectorAll('.group').length") == 10, "the page's own script ran"
    assert page.ask("window.broken") is None
    assert len([each for each in page.complaints if "Content Security Policy" in each]) >= 3
    reached = page.ask("fetch('https://example.invalid/').then(() => 'reached', () => 'refused')")
    assert reached == "refused"


def test_images_of_the_prompt(page: Page, tmp_path: Path) -> None:
    run = make_run(tmp_path / "popo-seed1", rows=samples(1, 0, images=["there.png", "gone.png", "no_picture.txt"]))
    Image.new("RGB", (60, 40), "red").save(run / "there.png")
    (run / "no_picture.txt").write_text("secret")
    output = made(tmp_path, run)
    page.open(output)
    page.wait("document.querySelector('.group img')?.naturalWidth === 60")
    shown = page.ask("document.querySelector('.group').innerText")
    assert "no picture at gone.png" in shown and "no picture at no_picture.txt" in shown
    assert "secret" not in output.read_text() and page.complaints == []


def test_ten_thousand_samples_stay_quick(page: Page, tmp_path: Path) -> None:
    rows = [
        row for group in range(2500) for row in samples(1 + group // 5, group, response=f"{group} " + "word " * 100)
    ]
    output = made(tmp_path, make_run(tmp_path / "popo-seed1", rows=rows), options=("--samples", "10000"))
    began = time.monotonic()
    page.open(output)
    assert page.ask(COUNT) == "2,500 groups, 10,000 responses"
    assert time.monotonic() - began < 15
    assert page.ask("document.querySelectorAll('.answer').length") == 40, "a page of them"
    spent = "(() => {{ const began = performance.now(); ({0})({1}); return performance.now() - began; }})()"
    assert page.ask(spent.format(CHOOSE, "'outcome', 'mixed'")) < 2000
    write(page, "text", "2401 word", "1 groups, 4 responses")
    assert page.complaints == []
