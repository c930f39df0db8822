"""Every script answers --help, and the benchmarks run, at their smallest sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers.forked import run_forked
from helpers.places import REPOSITORY

SCRIPTS = {path.stem: path for path in sorted((REPOSITORY / "scripts").glob("*.py"))}
COMMANDS = [name for name, path in SCRIPTS.items() if '"__main__"' in path.read_text()]
PACKAGES = {"peer_trl": "trl"}  # of environments of their own
OUT = "OUT.json"
SMALLEST = {  # arguments of benchmarks that need no minutes, and whether they write a file
    "bench_attention": "--device cpu --dtype float32 --heads 2 --key-heads 1 --groups 2 --prompt 8 --response 16 "
    "--repeats 1",
    "bench_buffer": f"--sizes 100 1000 --sampled 8 --problems 20 --distinct 4 --repeats 1 --out {OUT}",
    "bench_critics": f"--iterations 5 --seeds 1 --out {OUT}",
    "bench_memory": f"--hidden 64 --vocabulary 1000 --tokens 1024 --leave-gib 3 --out {OUT}",
    "bench_overhead": f"--iterations 2 --out {OUT}",
    "bench_plan": f"--hidden 64 --layers 2 --vocabulary 1000 --tokens 512 --out {OUT}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), "--help"])
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: ") and len(said.splitlines()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / OUT) if each == OUT else each for each in SMALLEST[name].split()]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of tests side by side would wait for each other
    done = run_forked([SCRIPTS[name], *arguments], alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    if OUT in SMALLEST[name]:
        assert json.loads((tmp_path / OUT).read_text())
    else:
        assert done.stdout
