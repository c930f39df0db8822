"""Configurations are part of the package and are found by name from any folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.places import REPOSITORY
from helpers.tiny_models import environment, metrics, popo

from popo_lightning.cli.config_files import check_config_files
from popo_lightning.cli.shipped_configs import config_path, main, shipped, with_config_names, with_config_paths
from popo_lightning.core.config_options import configs_first
from popo_lightning.core.errors import SettingError

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["method/popo", "method/popo.yaml", "configs/method/popo.yaml", "configs/method/popo"])
def test_a_name_is_found_from_any_folder(name: str, elsewhere: Path) -> None:
    assert Path(config_path(name)) == REPOSITORY / "configs" / "method" / "popo.yaml"


def test_a_file_here_comes_first(elsewhere: Path) -> None:
    own = elsewhere / "method" / "popo.yaml"
    own.parent.mkdir()
    own.write_text("run: {method: mine}\n")
    assert config_path("method/popo") == "method/popo.yaml"
    assert config_path("method/grpo").endswith("configs/method/grpo.yaml")


def test_what_is_nowhere_stays_as_it_is(elsewhere: Path) -> None:
    for name in ("method/nothing", "popo", "configs", "method", "../method/popo", str(elsewhere)):
        assert config_path(name) == name


def test_only_what_follows_the_option_is_a_name(elsewhere: Path) -> None:
    args = [
        "fit",
        "--config",
        "task/countdown_tiny",
        "-c=method/popo",
        "--run.task",
        "method/popo",
        "--config",
        "{a: 1}",
    ]
    found = with_config_paths([*args, "--config"])
    assert found[0] == "fit" and found[2].endswith("configs/task/countdown_tiny.yaml")
    assert found[3].startswith("-c=") and found[3].endswith("configs/method/popo.yaml")
    assert found[4:] == [*args[4:], "--config"]
    assert with_config_names(found) == [*args, "--config"], "shown commands have the names again"
    (elsewhere / "task").mkdir()
    (elsewhere / "task" / "countdown_tiny.yaml").write_text("{}")
    assert with_config_names(found)[2] == found[2], "a file of one's own has that name here"


def test_settings_are_over_files_that_follow_them() -> None:
    args = ["fit", "--trainer.max_epochs", "1", "--config", "a.yaml", "--run.task", "-c", "-c=b.yaml", "--plan"]
    assert configs_first(args[:5]) == ["fit", "--config", "a.yaml", "--trainer.max_epochs", "1"]
    assert configs_first([*args[:5], *args[7:]]) == [
        *["fit", "--config", "a.yaml", "-c=b.yaml", "--trainer.max_epochs", "1", "--plan"]
    ]
    assert configs_first(["--config", "a.yaml", "fit"]) == ["--config", "a.yaml", "fit"]
    assert configs_first(["fit", "--x", "--config"]) == ["fit", "--x", "--config"] and configs_first([]) == []


def test_settings_stay_over_files_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        popo("fit", "--trainer.max_epochs", "1", "--config", "task/countdown_tiny", "--print_config")
    assert "max_epochs: 1\n" in capsys.readouterr().out


def test_every_file_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped()) and len(lines) > 80
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines), "a file says in its first line what it is"
    assert main(["method"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((REPOSITORY / "configs" / "method").iterdir()))


def test_one_is_printed_or_copied_and_replaces_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["method/popo"]) == 0
    printed = capsys.readouterr().out
    assert printed == (REPOSITORY / "configs" / "method" / "popo.yaml").read_text()
    assert main(["method/popo", "--copy", "mine/rule.yaml"]) == 0
    assert (elsewhere / "mine" / "rule.yaml").read_text() == printed
    (elsewhere / "mine" / "rule.yaml").write_text("mine")
    assert main(["method/popo", "--copy", "mine/rule.yaml"]) == 2
    assert (elsewhere / "mine" / "rule.yaml").read_text() == "mine"
    assert main(["methd/pop"]) == 2 and "did you mean method/popo?" in capsys.readouterr().err
    assert main(["method", "--copy", "all.yaml"]) == 2
    assert main(["--copy", "all.yaml"]) == 2 and "needs the name of a configuration" in capsys.readouterr().err
    assert main(["method/"]) == 0


def test_a_misspelt_name_is_answered_with_the_nearest(elsewhere: Path) -> None:
    for name, near in {"method/popoo": "method/popo", "task/cuntdown_tiny": "task/countdown_tiny"}.items():
        with pytest.raises(SettingError, match=f"did you mean .*{near}"):
            check_config_files(["fit", "--config", name])


def test_popo_is_four_lines() -> None:
    text = (REPOSITORY / "configs" / "method" / "popo.yaml").read_text()
    content = yaml.safe_load(text)
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 5
    assert content.keys() == {"run", "data", "model"}


def test_the_package_has_every_room() -> None:
    rooms = {
        ".".join(file.parent.relative_to(REPOSITORY).parts) for file in REPOSITORY.glob("popo_lightning/**/__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == rooms | {"popo_lightning.configs"}


@pytest.mark.slow
def test_an_installed_package_trains_from_an_empty_folder(tmp_path: Path) -> None:
    """The folder has only a user's own rule, and nothing of the checkout is reachable."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-q", "-w", str(tmp_path / "wheel")]
    subprocess.run([*build, str(REPOSITORY)], check=True, timeout=300)
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    home = tmp_path / "empty"
    home.mkdir()
    (home / "my_rule.py").write_text(
        "from popo_lightning.replay.composer import Composer\n\n\nclass Mine(Composer):\n"
        "    def compose(self, iteration):\n        return iteration.split(iteration.rollout())[0]\n"
    )
    settings = [
        "--data.engine",
        "TransformersEngine",
        "--data.problems_per_iteration",
        "6",
        "--trainer.max_epochs",
        "1",
    ]
    settings += ["--evaluation.at_start", "false", "--evaluation.limit", "4", "--data.composer", "my_rule.Mine"]
    files = ["--config", "task/countdown_tiny", "--config", "method/popo", "--model.warm_start.examples", "3000"]
    code = "import popo_lightning.__main__ as m; print(m.__file__); m.main()"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code, "fit", *files, *settings, "--run.folder", "run"],
        cwd=home,
        env=environment() | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.startswith(str(tmp_path / "installed"))
    assert metrics(home / "run")[-1]["step"] == 1
