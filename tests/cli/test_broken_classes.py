"""A user's class that cannot be constructed or imported gives one sentence with setting, fault and place."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from helpers import classes
from helpers.tiny_models import method, popo

from popo_lightning.core.did_you_mean import object_at

DATASET = ["--data.task", "popo_lightning.tasks.dataset.DatasetTask", "--data.task.train", "[{path: a.jsonl}]"]
DATASET += ["--data.task.benchmarks", "{}", "--data.task.verifier"]
SLOTS = {  # the class, the options before its name, what it raises
    "BrokenVerifier": (DATASET, "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/words'"),
    "TwoLines": (DATASET, "ValueError: of two lines"),
    "Leaves": (DATASET, "SystemExit: 7"),
    "BrokenTask": (["--data.task"], "ZeroDivisionError: division by zero"),
    "BrokenComposer": (["--data.composer"], "AttributeError: 'BrokenComposer' object has no attribute 'nothing'"),
    "BrokenEngine": (["--data.engine"], "AssertionError"),
    "BrokenSampler": (["--data.sampler"], "NotImplementedError"),
    "BrokenWeight": (["--model.behave_weight"], "TypeError: TruncatedIS.__init__() got an unexpected"),
    "BrokenProximal": (["--proximal"], "ValueError: invalid literal for int()"),
    "BrokenCallback": (["--trainer.callbacks"], "ImportError: libwords is not there"),
    "BrokenOptimizer": (["--model.optimizer"], "OSError: no kernel"),
}
MODULES = {
    "def :\n": "SyntaxError: invalid syntax at {file}:1",
    "\nraise RuntimeError('half an import')\n": "RuntimeError: half an import at {file}:2",
    "import sys\nsys.exit(3)\n": "SystemExit: 3 at {file}:2",
}


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        popo(*args)
    assert stopped.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    print(sentence)
    assert sentence.startswith("popo: ")
    return sentence


@pytest.mark.parametrize("name", SLOTS)
def test_a_constructor_that_raises(
    name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
    options, fault = SLOTS[name]
    given = [*options, f"helpers.classes.{name}"]
    sentence = refused(capsys, "fit", "--config", config, *method("popo"), "--run.root", tmp_path, *given)
    assert f"{options[-1].lstrip('-')}" in sentence.partition(" is ")[0]
    assert f"is helpers.classes.{name}, whose constructor raised {fault}" in sentence
    lines, first = inspect.getsourcelines(getattr(classes, name))
    place = first + len(lines) - 1 if name != "BrokenVerifier" else first + 2
    assert f"helpers/classes.py:{place}; give it other settings" in sentence


@pytest.mark.parametrize("content", MODULES)
def test_a_module_that_raises(
    content: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"half_a_module_{list(MODULES).index(content)}.py"
    file.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sentence = refused(capsys, "fit", "--config", config, "--data.task", f"{file.stem}.Task")
    assert f"popo: data.task is {file.stem}.Task, whose module raised " in sentence
    assert MODULES[content].format(file=file.name) in sentence


def test_a_class_whose_module_has_its_name(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's attribute, not its module, is what a class_path names."""
    package = tmp_path / "lengths"
    package.mkdir()
    (package / "__init__.py").write_text("from .Short import Short\n")
    (package / "Short.py").write_text(
        "from helpers.classes import BrokenVerifier\nclass Short(BrokenVerifier):\n"
        "    def __init__(self):\n        raise RuntimeError('no words')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert inspect.isclass(object_at("lengths.Short"))
    sentence = refused(capsys, "fit", "--config", config, *method("popo"), *DATASET, "lengths.Short")
    assert "data.task.verifier is lengths.Short.Short, whose constructor raised RuntimeError: no words" in sentence


def test_the_traceback_by_jsonargparses_own_switch(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(SystemExit):
        popo("fit", "--config", config, "--data.task", "helpers.classes.BrokenTask")
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "self.share = 1 / 0" in error
    assert error.splitlines()[-1].startswith("popo: data.task is helpers.classes.BrokenTask")
