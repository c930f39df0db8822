"""`popo --help` and what else needs no model is answered without the libraries that take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.tiny_models import environment

from popo_lightning import __version__
from popo_lightning.__main__ import SUBCOMMANDS, main
from popo_lightning.cli.main import PopoCLI

HEAVY = ("torch", "vllm", "transformers", "lightning", "jsonargparse", "datasets", "numpy", "sympy")
SCRIPT = f"""
import sys
from popo_lightning.__main__ import main
try:
    main()
except SystemExit as ended:
    found = [name for name in {HEAVY!r} if name in sys.modules]
    print("heavy:", found, ended.code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "code"), [(["--help"], 0), (["-h"], 0), (["--version"], 0), (["fti"], 2), ([], 2)], ids=str
)
def test_nothing_heavy_is_imported(args: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == f"heavy: [] {code}", done.stderr


def said(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["popo", *args])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_lists_every_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(["--help"], monkeypatch, capsys)
    assert SUBCOMMANDS.keys() == {*PopoCLI.subcommands(), "compare", "configs"}
    for name, about in SUBCOMMANDS.items():
        assert f"  {name} " in out and about in out
    assert max(map(len, out.splitlines())) <= 110
    assert said(["--version"], monkeypatch, capsys)[0] == f"popo {__version__}\n"


def test_a_subcommand_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in {
        "fti": "'fti' is no subcommand; did you mean fit?",
        "compre": "did you mean compare?",
        "weather": "name one of fit, validate, test, predict, compare",
        "": "popo: name one of fit",
    }.items():
        out, err = said([given] if given else [], monkeypatch, capsys)
        assert out == "" and words in err and len(err.splitlines()) == 1


def test_help_of_a_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(["fit", "--help"], monkeypatch, capsys)
    assert "--data.group_size" in out and "--plan" in out
