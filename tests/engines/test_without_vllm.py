"""Without vLLM, everything that needs it gives one sentence, and training works with transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.places import REPOSITORY
from helpers.tiny_models import method, metrics, popo

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import EngineContext
from popo_lightning.engines.vllm import process
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.policy import PolicyModule


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every import of vllm fail, even if it is installed or already imported."""
    for name in ("vllm", *(name for name in sys.modules if name.startswith("vllm."))):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)  # type: ignore[arg-type]


def test_a_run_is_refused_before_a_model_loads(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PolicyModule, "configure_model", lambda self: pytest.fail("a model loads"))
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, *method("popo"), "--run.root", tmp_path, "--data.engine", "VLLMEngine")
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("popo: ")]
    assert "data.engine is VLLMEngine but vLLM does not import" in sentence and "TransformersEngine" in sentence


def test_an_engine_of_ones_own_script() -> None:
    with pytest.raises(SettingError, match=r"vLLM does not import .*; install the extra 'cpu' or 'gpu', or set"):
        VLLMEngine().start(EngineContext(Path("nowhere"), torch.device("cpu"), torch.float32, 0, 1, 32))


def test_a_mac_is_not_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "darwin")
    monkeypatch.setattr(process.platform, "system", lambda: "Darwin")
    sentence = str(process.not_installed(ImportError("No module named 'vllm'")))
    assert "vLLM has no wheel for Darwin; set data.engine to" in sentence and "install the extra" not in sentence


def test_the_transformers_engine_trains(config: Path, tmp_path: Path) -> None:
    fast = ["--trainer.max_epochs", "1", "--evaluation.at_start", "false", "--evaluation.limit", "2"]
    popo("fit", "--config", config, *method("popo"), "--run.folder", tmp_path / "run", *fast)
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1]


def test_a_question_to_a_policy(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from popo_lightning.cli.export import asked_policy
    from popo_lightning.cli.export.saved_policy import saved_policy

    fast = ["--trainer.max_epochs", "1", "--evaluation.at_start", "false", "--evaluation.limit", "2"]
    popo("fit", "--config", config, *method("popo"), "--run.folder", tmp_path / "run", *fast)
    monkeypatch.setattr(asked_policy, "find_spec", lambda name: None)
    question = asked_policy.Question("1,2=3", n=1)
    with pytest.raises(SettingError, match="--engine is vllm, which is not installed here; leave it out"):
        asked_policy.answers(saved_policy(str(tmp_path / "run")), question, "vllm")


def test_a_server_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!{shutil.which("bash")}\nexec {sys.executable} -S -I "$@"\n')  # sees no packages
    python.chmod(0o755)
    script = REPOSITORY / "scripts" / "serve.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    done = subprocess.run(["bash", script, "nowhere", "8000", "32"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"serve: {python} has no vLLM, which has wheels for Linux alone; install the extra cpu")
