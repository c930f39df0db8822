"""A refusal that all ranks share is printed once. A rank that refuses alone prints it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import on_two_ranks
from helpers.tiny_models import environment, method

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def spoken(refusing: list[int], folder: str) -> str:
    """Returns what this rank prints if some ranks, joined over gloo, refuse."""
    import contextlib
    import io

    import torch.distributed as dist

    from popo_lightning.core import rank_refusals

    rank_refusals.SECONDS = 3.0
    dist.init_process_group("gloo")
    heard = io.StringIO()
    if (rank := dist.get_rank()) in refusing:
        with contextlib.redirect_stderr(heard):
            rank_refusals.print_refusal("no")
    Path(folder, f"done{rank}").touch()
    while not all(Path(folder, f"done{other}").exists() for other in range(2)):  # rank 0 hosts the store of both ranks
        pass
    dist.destroy_process_group()
    return heard.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("refusing", "said"), [([0, 1], ["popo: no\n", ""]), ([1], ["", "popo: no\n"])])
def test_joined_ranks(refusing: list[int], said: list[str], tmp_path: Path) -> None:
    assert on_two_ranks(spoken, tmp_path, refusing, str(tmp_path)) == said


def sentences(args: list[str | Path], launcher: list[str], **variables: str) -> list[str]:
    ended = subprocess.run(
        [*launcher, *map(str, args)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode != 0
    return [line for line in ended.stderr.splitlines() if line.startswith("popo: ")]


@pytest.mark.slow
def test_torchrun(config: Path, tmp_path: Path) -> None:
    """The refusal comes before there is a process group."""
    args = ["fit", "--config", config, *method("popo"), "--run.root", tmp_path, "--trainer.devices", "2"]
    (sentence,) = sentences([*args, "--data.group_size", "0"], [*TORCHRUN, "-m", "popo_lightning"])
    assert "data.group_size is 0" in sentence


@pytest.mark.slow
def test_ranks_that_lightning_starts(config: Path, tmp_path: Path) -> None:
    """The refusal comes after the ranks have joined."""
    args = ["fit", "--config", config, *method("popo"), "--run.root", tmp_path, "--trainer.devices", "2"]
    (sentence,) = sentences(args, [sys.executable, "-m", "popo_lightning"])
    assert "data.problems_per_iteration is 9, which 2 ranks cannot share evenly" in sentence


def test_a_single_process_needs_nobody(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from popo_lightning.core.rank_refusals import print_refusal

    for name in ("TORCHELASTIC_USE_AGENT_STORE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    print_refusal("no")
    assert capsys.readouterr().err == "popo: no\n"
    assert "RANK" not in os.environ
