"""`popo show` reads all files of a run, counts damaged lines, and refuses folders that are not runs."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.shown_runs import make_odd_run, make_run, metrics_text, samples, write_lines
from helpers.tiny_models import REPOSITORY, environment
from PIL import Image

from popo_lightning.cli.show.command import made, main
from popo_lightning.cli.show.html import SCRIPTS, data_text
from popo_lightning.cli.show.run_files import LARGEST_LINE
from popo_lightning.cli.show.runs import MAX_POINTS, Limits, columns, names_of, read_run
from popo_lightning.core.hidden_secrets import shown_command

LIMITS = Limits(samples=1000, evaluated=1000, images=10)
HEAVY = ("torch", "lightning", "transformers", "vllm", "numpy", "jsonargparse")


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("popo: ")
    return captured.err


def content_of(page: Path) -> dict[str, Any]:
    text = page.read_text("ascii")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])  # type: ignore[no-any-return]


# -- what is read --------------------------------------------------------------------------------------------------


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "popo-seed1", iterations=10), "popo-seed1", LIMITS)
    assert (run["method"], run["task"], run["seed"], run["iterations"]) == ("popo", "sums", "1", 10)
    assert run["finished"] and run["wallSeconds"] == 75.0 and run["skipped"] == {}
    assert run["columns"]["step"] == list(range(11))
    assert run["columns"]["eval/sums/greedy"] == [0.0, *[None] * 4, 0.05, *[None] * 4, 0.1]
    assert run["columns"]["reward/score"][0] is None
    assert [each["label"] for each in run["evaluations"]] == ["iteration-000000", "iteration-000010"]
    assert run["evaluations"][1]["benchmarks"]["sums"]["breakdown"]["level"]["2"]["greedy"] == 0.5
    trained = [group for group in run["groups"] if "evaluated" not in group]
    assert len(trained) == 20 and len(run["groups"]) == 24 and run["leftOut"]["samples"] == 0
    assert trained[3] == {
        "problem": "problem 3",
        "prompt": [{"role": "", "text": "3+3="}],
        "gold": '{"sum": 6}',
        "fresh": False,
        "images": [],
        "iteration": 2,
        "responses": trained[3]["responses"],
    }
    assert trained[3]["responses"][0] == {
        "text": "the sum is 0 of group 3",
        "right": True,
        "score": 1.0,
        "parts": {"score": 1.0, "acc": 1.0, "format": 1.0},
        "advantage": -1.5,
        "age": 2.0,
        "tokens": 5.0,
        "end": "length",
        "cut": 0,
    }
    evaluated = run["groups"][-1]
    assert evaluated["info"] == {"level": "2", "subject": "algebra"} and evaluated["iteration"] == 10
    assert [response.get("greedy", False) for response in evaluated["responses"]] == [True, *[False] * 4]


def test_secrets_are_not_in_the_page(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"), "run", LIMITS)
    assert run["command"] == "popo fit --config popo.yaml --api_key=(not shown)"
    assert run["settings"] == {"model.path": "tiny", "run.method": "popo", "server.api_key": "(not shown)"}


SECRETS = {  # what was typed, and what others see of it
    "--a.api_key S": "--a.api_key (not shown)",
    "--a.init_args.password='S S'": "--a.init_args.password=(not shown)",
    "--a.password 'S S' --b 1": "--a.password (not shown) --b 1",
    "--a.api_keys S S --b 1": "--a.api_keys (not shown) (not shown) --b 1",
    "--a.token S --max_new_tokens 8": "--a.token (not shown) --max_new_tokens 8",
    "--a.reward_key score": "--a.reward_key score",
    """--a '{"b": {"api_key": "S", "c": [1]}}'""": """--a '{"b": {"api_key": "(not shown)", "c": [1]}}'""",
    "'--a={b: {hf_token: S}, c: 2}'": """'--a={"b": {"hf_token": "(not shown)"}, "c": 2}'""",
    "--a+ '[{secret: [S, S]}]'": """--a+ '[{"secret": "(not shown)"}]'""",
    "--a '{api_key: S'": "--a '(not shown)'",
    "--a '{x: &x S, api_key: *x}'": "--a '(not shown)'",
    "--a 'api_key: S": "(not shown)",
    "--a 'no secret in it'": "--a 'no secret in it'",
    "--a.openai_key S --a.bearer S": "--a.openai_key (not shown) --a.bearer (not shown)",
    "--a https://bob:S@host/x": "--a '(not shown)'",
    "--a 'https://host/x?v=1&api_key=S'": "--a '(not shown)'",
    """--a '["Authorization: Bearer S"]'""": """--a '["(not shown)"]'""",
    "--a https://host:80/x": "--a https://host:80/x",
}


@pytest.mark.parametrize("typed", SECRETS)
def test_secrets_are_not_in_commands(typed: str) -> None:
    command = f"popo fit --config a.yaml {typed}"
    expected = f"popo fit --config a.yaml {SECRETS[typed]}"
    assert shown_command(command) == (expected if "'api_key: S" not in typed else "(not shown)")
    assert re.search(r"[ :=]S\b", shown_command(command)) is None


def test_secrets_within_a_setting_are_not_in_the_page(tmp_path: Path) -> None:
    """Of a run whose config.yaml is gone."""
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    settings = {"data.engine": '[{"api_key": "S", "port": 1}]', "data.password": '"S"', "model.lr": "1.0"}
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    shown = {
        "data.engine": '[{"api_key": "(not shown)", "port": 1}]',
        "data.password": "(not shown)",
        "model.lr": "1.0",
    }
    assert read_run(run, "run", LIMITS)["settings"] == shown


def test_the_command_of_a_run_that_says_none_can_be_pasted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run")
    (run / "run.json").unlink()
    assert read_run(run, "run", LIMITS)["command"] == f"popo fit --config '{run / 'config.yaml'}'"


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Rows have no gold, parts or group, and the record no command. Groups are told apart by their problems."""
    old = ("iteration", "problem", "prompt", "response", "score", "advantage", "age", "finish_reason")
    rows = [{name: row[name] for name in old} for group in (1, 2, 3) for row in samples(1, group)]
    run = make_run(tmp_path / "run", rows=rows)
    record = json.loads((run / "run.json").read_text())
    del record["command"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "config.yaml").unlink()
    found = read_run(run, "run", LIMITS)
    assert [group["fresh"] for group in found["groups"][:3]] == [False, True, False]
    assert [response.get("right", False) for response in found["groups"][1]["responses"]] == [True, True, False, False]
    assert found["command"] == "" and found["settings"] == {"model.path": '"tiny"'}


def test_a_run_under_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text(metrics_text(2, "popo"))
    found = read_run(run, "run", LIMITS)
    assert not found["finished"] and found["groups"] == [] and found["evaluations"] == [] and found["method"] == ""


# -- damage --------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", iterations=4)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    width = lines[0].count(",")
    bad = ["1,2,3\n", "x" + "," * width + "\n", "1.5" + "," * width + "\n", '"' + "a" * 200000 + "\n", "\0\n"]
    not_finite = ",".join(["4", "nan", "inf", *[""] * (width - 2)]) + "\n"  # not damaged, but nothing to show
    half = "5" + "," * width  # its last numbers are not written yet
    (run / "metrics.csv").write_text("".join([*lines, *bad, not_finite, half]))
    with (run / "samples.jsonl").open("ab") as file:
        deep = b"[" * 100000 + b"]" * 100000
        for line in (b"{", b"[1]", b'"text"', b'{"iteration": 1}', b'{"response": 5}', deep, b"\xff\xfe", b"1" * 5000):
            file.write(line + b"\n")
        file.write(b'{"response": "' + b"a" * (LARGEST_LINE + 10) + b'"}\n')
        file.write(b"\n")
        file.write(b'{"iteration": 4, "response": "half')
    (run / "summary.json").write_text("{")
    (run / "evaluations/iteration-000000/results.json").write_text('{"iteration": 0, "benchmarks": []}')
    assert main([str(run), "--output", str(tmp_path / "show.html")]) == 0
    out = capsys.readouterr().out
    for count, name in ((6, "metrics.csv"), (10, "samples.jsonl"), (1, "summary.json")):
        assert f"run: skipped {count} damaged lines of {name}\n" in out
    assert "skipped 1 damaged lines of evaluations/iteration-000000/results.json" in out
    found = content_of(tmp_path / "show.html")["runs"][0]
    assert found["columns"]["step"] == [0, 1, 2, 3, 4] and len(found["groups"]) == 8 + 4
    assert found["skipped"]["metrics.csv"] == 6


def test_values_of_any_kind_are_only_shown(tmp_path: Path) -> None:
    text, notes = made([make_odd_run(tmp_path / "run")], LIMITS)
    content = json.loads(text.split('id="data">')[1].split("</script>")[0], parse_constant=pytest.fail)
    assert notes == [] and len(content["runs"][0]["groups"]) == 20


def test_a_config_with_a_tree_without_an_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in pairwise("abcdefghi"):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for text in (bomb, "a: &a {b: *a}\n", "a: &a [*a]\n", "a: !!python/object/apply:os.system [exit]\n", "- 1\n", "\0"):
        (run / "config.yaml").write_text(text)
        assert len(read_run(run, "run", LIMITS)["settings"]) <= 1000


def test_json_ends_no_script_element() -> None:
    for text in ("</script>", "<!--", "]]>", "\u2028", "\ud800", "&lt;"):
        written = data_text({"text": text})
        assert json.loads(written) == {"text": text} and written.isascii() and not set(written) & set("<>&")


# -- bounds --------------------------------------------------------------------------------------------------------


def test_samples_are_bounded_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", iterations=50)
    output = tmp_path / "show.html"
    assert main([str(run), "--samples", "40", "--evaluated", "5", "--output", str(output)]) == 0
    found = content_of(output)["runs"][0]
    trained = [group for group in found["groups"] if "evaluated" not in group]
    assert len(trained) == 10 and [group["iteration"] for group in trained] == list(range(5, 51, 5))
    out = capsys.readouterr().out
    assert "run: left out 360 of the responses in samples.jsonl; --samples shows more\n" in out
    assert "run: left out 15 of the responses of the last evaluation; --evaluated shows more\n" in out
    assert main([str(run), "--samples", "0", "--evaluated", "0", "--output", str(output)]) == 0
    assert content_of(output)["runs"][0]["groups"] == []


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_a_bound_is_never_exceeded(size: int, tmp_path: Path) -> None:
    rows = [row for group in range(40) for row in samples(group, group, size=1 + group % size)]
    run = make_run(tmp_path / "run", rows=rows)
    for limit in (0, 1, 10, 100, len(rows), len(rows) + 1):
        found = read_run(run, "run", Limits(limit, 0, 0))
        shown = sum(len(group["responses"]) for group in found["groups"])
        assert shown <= limit and shown + found["leftOut"]["samples"] == len(rows)
        assert shown == len(rows) or limit < len(rows)


def test_long_texts_and_curves_are_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=samples(1, 0, size=1, response="a" * 5000))
    response = read_run(run, "run", LIMITS)["groups"][0]["responses"][0]
    assert len(response["text"]) == 4000 and response["cut"] == 1000
    rows = {step: {"a": float(step), "b_max": float(step), "total/c": float(step)} for step in range(1, 3001)}
    found = columns(rows)
    assert len(found["step"]) == MAX_POINTS and found["step"][:2] == [3, 6]
    assert (found["a"][0], found["b_max"][0], found["total/c"][0]) == (2, 3, 3)
    assert columns({}) == {"step": []}


def test_images_are_made_small_and_new(tmp_path: Path) -> None:
    names = [*(f"{place}.png" for place in range(4)), "text.txt", "link", "/dev/zero", "\0", "folder"]
    rows = [row for place, name in enumerate(names) for row in samples(1, place, size=1, images=[name, 5])]
    run = make_run(tmp_path / "run", rows=rows)
    for place in range(4):
        Image.new("RGB", (3000, 2000), (place, 0, 0)).save(run / f"{place}.png", comment="private")
    (run / "text.txt").write_text("secret")
    (run / "folder").mkdir()
    (run / "link").symlink_to("/etc/passwd")
    found = read_run(run, "run", Limits(100, 0, 3))
    assert list(found["images"]) == ["0.png", "1.png", "2.png"] and found["leftOut"]["images"] == 3
    for url in found["images"].values():
        kind, _, content = url.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.size == (448, 299) and kind in ("data:image/png", "data:image/webp")
            assert "comment" not in picture.info


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "RUN is 'nowhere', which does not exist; name a run's folder" in said(capsys, "nowhere")
    Path("file").write_text("")
    assert "RUN is 'file', which is no folder" in said(capsys, "file")
    Path("empty").mkdir()
    assert "RUN is 'empty', which holds no run; name a folder that popo fit wrote" in said(capsys, "empty")
    make_run(Path("runs/sums/popo-seed1"))
    assert "RUN is 'runs', which holds no run; name one of runs/sums/popo-seed1" in said(capsys, "runs")
    Path("empty/metrics.csv").write_text("step\n1,2\n")
    words = "where neither an iteration nor a response has been written (1 damaged lines in metrics.csv)"
    assert words in said(capsys, "empty")
    assert not Path("show.html").exists()


def test_settings_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert "the following arguments are required: RUN; popo show --help" in said(capsys)
    assert "unrecognized arguments: --sample" in said(capsys, run, "--sample", "5")
    assert "--samples is -1; use 0 for none, or more" in said(capsys, run, "--samples", "-1")
    assert "--images: invalid int value: 'many'" in said(capsys, run, "--images", "many")
    assert "name 12 runs at most" in said(capsys, *[run] * 13)
    assert "metrics.csv', which names no HTML file" in said(capsys, run, "--output", run / "metrics.csv")
    assert "whose folder does not exist" in said(capsys, run, "--output", tmp_path / "gone/show.html")
    other = tmp_path / "other.html"
    other.write_text("<html>mine</html>")
    assert "exists and is no page of popo show" in said(capsys, run, "--output", other)
    assert other.read_text() == "<html>mine</html>"
    output = tmp_path / "show.html"
    for _ in range(2):  # its own page is replaced
        assert main([str(run), str(run), "--output", str(output)]) == 0
    assert [found["name"] for found in content_of(output)["runs"]] == ["run"], "named twice, shown once"
    assert sorted(path.name for path in tmp_path.glob("show*")) == ["show.html"]


def test_names_tell_runs_apart() -> None:
    paths = [Path("/runs/a/popo-seed1"), Path("/runs/b/popo-seed1"), Path("/runs/b/grpo-seed1")]
    assert names_of(paths) == ["a/popo-seed1", "b/popo-seed1", "b/grpo-seed1"]
    assert names_of(paths[1:]) == ["popo-seed1", "grpo-seed1"] and names_of(paths[:1]) == ["popo-seed1"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=samples(1, 0, images=["there.png"]))
    Image.new("RGB", (60, 40), "red").save(run / "there.png")
    script = (
        "import sys\nfrom popo_lightning.__main__ import main\ntry:\n    main()\nexcept SystemExit as ended:\n"
        f"    print(ended.code, [name for name in {HEAVY} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, "show", str(run), "--output", str(tmp_path / "show.html")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert content_of(tmp_path / "show.html")["runs"][0]["images"]


def test_a_page_is_written_whole_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "show.html.draft").mkdir()
    assert "which cannot be written" in said(capsys, run, "--output", tmp_path / "show.html")
    assert not (tmp_path / "show.html").exists()


def test_evaluations_of_several_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    there = run / "evaluations/iteration-000020"
    lines = (there / "sums.jsonl").read_text().splitlines(keepends=True)
    (there / "sums.jsonl").unlink()
    for rank in range(2):
        (there / f"sums.rank{rank}-of-2.jsonl").write_text("".join(lines[10 * rank : 10 * rank + 10]))
    write_lines(run / "evaluations/validate/sums.jsonl", [{"response": "of another evaluation"}])
    found = [group for group in read_run(run, "run", LIMITS)["groups"] if "evaluated" in group]
    assert [group["problem"] for group in found] == [f"held out {place}" for place in range(4)]


def test_the_wheel_has_the_page() -> None:
    """The folder has exactly the files of which the page is made, and the package declares them as data."""
    there = {path.name for path in (REPOSITORY / "popo_lightning/cli/show/page").iterdir()}
    assert there == {"style.css", *SCRIPTS}
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert declared["popo_lightning.cli.show"] == ["page/*"]
