"""The settings of a comparison, and what is refused before any run starts."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from pathlib import Path

import pytest
from helpers.comparisons import method_files, planned, read_comparison, write_comparison
from helpers.places import REPOSITORY

from popo_lightning.__main__ import main as popo_main
from popo_lightning.cli.compare.checking import check_commands
from popo_lightning.cli.compare.command import main
from popo_lightning.cli.compare.plan import plan
from popo_lightning.cli.parser import OneSentenceParser

FILES = [
    pytest.param(file, marks=[] if file.stem == "quick" else [pytest.mark.slow], id=file.stem)
    for file in sorted((REPOSITORY / "configs" / "compare").glob("*.yaml"))
]


def test_plan_is_methods_times_labels_times_seeds(tmp_path: Path) -> None:
    sweep = {"low": {"model.optimizer.init_args.lr": 1e-5}, "high": {"model.optimizer.init_args.lr": 1e-4}}
    methods = {"grpo": {"seeds": [7]}, "popo": {"arguments": {"data.group_size": 8}}}
    path = write_comparison(tmp_path, methods, sweep=sweep, seeds=[1, 2], arguments={"data.group_size": 4})
    runs = plan(read_comparison(path))
    assert len(runs) == len({run.folder for run in runs}) == 2 * 2 + 2
    popo = planned(read_comparison(path), "popo", 2, "low")
    assert popo.folder == tmp_path / "root" / "runs" / "popo" / "low-seed2"
    assert popo.settings == ("--run.method=popo", "--data.group_size=8", "--model.optimizer.init_args.lr=1e-05")
    assert popo.arguments()[:3] == ["fit", "--config", str(tmp_path / "task.yaml")]
    assert popo.arguments()[-3:] == [f"--run.folder={popo.folder}", "--run.resume=true", "--seed_everything=2"]
    assert planned(read_comparison(path), "grpo", 7, "high").settings[1] == "--data.group_size=4"


def test_command_line_overrides_a_dotted_setting(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, arguments={"trainer.max_epochs": 5, "evaluation.benchmarks": {"a": {"limit": 1}}})
    (run, *_) = plan(read_comparison(path, "--arguments.trainer.max_epochs", "9", "--seeds", "[4]"))
    assert run.settings == (
        "--run.method=grpo",
        "--trainer.max_epochs=9",
        '--evaluation.benchmarks={"a": {"limit": 1}}',
    )
    assert run.seed == 4


def test_a_class_in_a_setting_stays_what_the_file_says(tmp_path: Path) -> None:
    """Only the parser of popo fit parses the class, because it knows which class an optimizer must be."""
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03}}
    path = write_comparison(tmp_path, sweep={"sgd": {"model.optimizer": sgd}})
    (run, *_) = plan(read_comparison(path))
    assert run.settings[-1] == '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03}}'


def test_a_parser_within_a_parser_raises() -> None:
    """The outer parser can then try another type of a union."""
    with pytest.raises(ArgumentError, match="--nope"):
        OneSentenceParser(exit_on_error=False).parse_args(["--nope"])


BAD = {
    "seeds": (["--seeds", "[1,1]"], ["seeds", "[1, 1]"]),
    "no seeds": (["--seeds", "[]"], ["seeds", "[]"]),
    "baseline": (["--baseline", "nope"], ["baseline", "nope", "grpo"]),
    "dynamic sampling": (["--dynamic_sampling", "nope"], ["dynamic_sampling", "nope"]),
    "own": (["--arguments", '{"run.folder": "x"}'], ["arguments", "run.folder", "leave it out"]),
    "task": (["--task", "[nope.yaml]"], ["task", "nope.yaml", "does not exist"]),
    "label": (["--sweep", '{"../up": {}}'], ["sweep", "../up", "letters"]),
    "method": (["--methods", '{"a/b": {}}'], ["methods", "a/b", "letters"]),
    "method alone": (
        ["--methods.grpo", "method/grpo"],
        ["methods has 'method/grpo' where settings belong", "{config:"],
    ),
    "methods alone": (["--methods", '{"a": null}'], ["methods has null where settings belong", "NAME: {config:"]),
    "final": (["--final_evaluations", "0"], ["final_evaluations", "0"]),
    "target": (["--target", "30"], ["target", "30"]),
    "at once": (["--at_once", "0"], ["at_once", "0"]),
    "seconds per run": (["--seconds_per_run", "-1"], ["seconds_per_run", "-1"]),
    "metric": (["--metric", "accuracy"], ["metric", "accuracy"]),
    "unknown": (["--sedes", "[1]"], ["sedes"]),
    "no file": (["--config", "nope.yaml"], ["nope.yaml"]),
    "twice": (
        ["--methods", '{"grpo": {"arguments": {"a.b": 1}}}', "--sweep", '{"low": {"a.b": 2}}'],
        ["a.b", "sweep.low", "methods.grpo.arguments"],
    ),
}


SHAPES = {  # methods in the file, and the sentence
    "a text": (
        {"grpo": "method/grpo"},
        "methods.grpo is 'method/grpo'; give its settings, such as {config: [method/grpo]}",
    ),
    "a list": (
        {"a": ["x/a", "b.yaml"]},
        "methods.a is [x/a, b.yaml]; give its settings, such as {config: [x/a, b.yaml]}",
    ),
    "null": ({"grpo": None}, "methods.grpo is null; give its settings, such as {config: [method/grpo]}"),
    "a number": ({"grpo": 3}, "methods.grpo is 3; give its settings, such as {config: [method/grpo]}"),
    "a file alone": (
        {"grpo": {"config": "method/grpo"}},
        "methods.grpo.config is 'method/grpo'; give a list of files, such as [method/grpo]",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_method_without_its_settings(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods, sentence = SHAPES[case]
    path = write_comparison(tmp_path, methods)
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"popo: {sentence}\n"


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_comparison(tmp_path)
    arguments, words = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(path), *arguments])
    assert stopped.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("popo: ")
    assert [word for word in words if word not in sentence] == []
    assert not (tmp_path / "root").exists()


def test_a_method_that_fit_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal comes before any run starts, and names the method."""
    task = [str(REPOSITORY / "configs" / "task" / "countdown_tiny.yaml")]
    methods = method_files("grpo", "popo")
    methods["popo"]["arguments"] = {"data.grupo_size": 4}
    path = write_comparison(tmp_path, methods, task=task)
    with pytest.raises(SystemExit):
        main(["--config", str(path)])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert [word for word in ("method popo", "data.grupo_size") if word not in sentence] == []
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("file", FILES)
def test_configurations(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """popo fit accepts every run of the shipped comparisons."""
    monkeypatch.chdir(REPOSITORY)
    check_commands(plan(read_comparison(file)))


def test_help_names_the_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["fit", "compare", "seeds"]),
        (["compare", "--help"], ["--dynamic_sampling"]),
    ):
        monkeypatch.setattr(sys, "argv", ["popo", *arguments])
        with pytest.raises(SystemExit) as stopped:
            popo_main()
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert [word for word in words if word not in said] == []
