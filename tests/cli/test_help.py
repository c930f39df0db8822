"""`popo --help` and other commands without a model do not import the libraries that take seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from helpers.places import REPOSITORY
from helpers.tiny_models import environment

from popo_lightning import __version__
from popo_lightning.__main__ import SUBCOMMANDS, main
from popo_lightning.cli.compare.checking import ParsedOnly
from popo_lightning.cli.help_texts import GROUPS
from popo_lightning.cli.main import run
from popo_lightning.cli.popo_cli import PopoCLI
from popo_lightning.core.errors import SettingError

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
    ("args", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["--version"], 0),
        (["fti"], 2),
        ([], 2),
        (["export", "-h"], 0),
        (["sample", "--help"], 0),
        (["estimate", "--help"], 0),
    ],
    ids=str,
)
def test_nothing_heavy_is_imported(args: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == f"heavy: [] {code}", done.stderr


def test_help_takes_less_than_two_seconds() -> None:
    """Measures the process's CPU time, which does not depend on how busy the machine is."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "popo_lightning", "--help"], env=environment(), check=True, timeout=60)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def said(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["popo", *args])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_lists_every_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(["--help"], monkeypatch, capsys)
    own = {"compare", "configs", "show", "export", "sample", "estimate", "completion"}
    assert SUBCOMMANDS.keys() == {*PopoCLI.subcommands(), *own}
    for name, about in SUBCOMMANDS.items():
        assert f"  {name} " in out and about in out
    assert max(map(len, out.splitlines())) <= 110
    assert said(["--version"], monkeypatch, capsys)[0] == f"popo {__version__}\n"


def test_a_subcommand_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in {
        "fti": "'fti' is no subcommand; did you mean fit?",
        "compre": "did you mean compare?",
        "weather": f"name one of {', '.join(SUBCOMMANDS)} (popo --help",
        "exprot": "did you mean export?",
        "": "popo: name one of fit",
    }.items():
        out, err = said([given] if given else [], monkeypatch, capsys)
        assert out == "" and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["export", "sample"])
def test_help_of_the_commands_for_a_trained_policy(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said([name, "--help"], monkeypatch, capsys)
    assert "RUN_OR_CHECKPOINT" in out and "--base" in out and f"usage: popo {name}" in out


def test_help_of_a_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(["fit", "--help"], monkeypatch, capsys)
    assert "--data.group_size" in out and "--plan" in out
    titles = re.findall(r"^(\w+):$", out, re.MULTILINE)
    assert titles == ["options", *GROUPS]  # the project's own, in order
    assert "--trainer.accumulate_grad_batches" not in out and "--trainer.max_epochs" in out and "--help_all" in out
    assert "--ckpt_path" in out and "hpc" not in out
    whole, _ = said(["fit", "--help_all"], monkeypatch, capsys)
    assert "--trainer.accumulate_grad_batches" in whole and "--data.group_size" in whole
    missing = {name for name in re.findall(r"^  (--\S+)", out, re.MULTILINE) if name not in whole}
    assert not missing


def test_only_the_called_subcommand_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Building each of the four parsers takes as long as parsing a command. A refusal still knows all settings."""
    built: list[str] = []
    prepare = PopoCLI._prepare_subcommand_parser

    def noted(self: PopoCLI, klass: type, subcommand: str, **kwargs: Any) -> Any:
        built.append(subcommand)
        return prepare(self, klass, subcommand, **kwargs)

    monkeypatch.setattr(PopoCLI, "_prepare_subcommand_parser", noted)
    command = ["--config", str(REPOSITORY / "configs" / "task" / "countdown_tiny.yaml"), "--run.folder", "anywhere"]
    assert ParsedOnly(["fit", *command]).config.fit.run.task == "countdown_tiny"
    assert built == ["fit"]
    with pytest.raises(SettingError, match=r"data\.group_size is many"):
        ParsedOnly(["fit", *command, "--data.group_size", "many"])
    with pytest.raises(SettingError, match=r"did you mean --data\.group_size"):
        ParsedOnly(["fit", *command, "--data.grop_size", "4"])
    assert set(built) == {"fit", "validate", "test", "predict"} and len(built) == 6
    built.clear()
    with pytest.raises(SettingError, match="--plan is an option of popo fit, not of popo validate"):
        ParsedOnly(["validate", *command, "--plan"])
    assert sorted(built) == ["fit", "predict", "test", "validate"]
    built.clear()
    with pytest.raises(SystemExit):
        run(["--help"])
    assert built == ["fit", "validate", "test", "predict"] and "predict" in capsys.readouterr().out
