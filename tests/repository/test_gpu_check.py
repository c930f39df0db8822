"""scripts/gpu_check.sh on the CPU: verdicts, time limits, state, comparison with published figures, and a whole run."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import REPOSITORY

from popo_lightning.toys.countdown import CountdownSteps

SCRIPTS = str(REPOSITORY / "scripts")


@pytest.fixture(autouse=True)
def scripts_importable() -> Iterator[None]:
    sys.path.insert(0, SCRIPTS)
    yield
    sys.path.remove(SCRIPTS)


def check(tmp_path: Path, seconds: float = 60.0, state: Path | None = None, name: str = "one") -> Any:
    from gpu_parts import Check

    out, work = tmp_path / name / "out", tmp_path / name / "work"
    out.mkdir(parents=True)
    work.mkdir()
    return Check("cpu", True, out, work, state, time.monotonic() + seconds)


# -- parts -----------------------------------------------------------------------------------------------------


def test_parts_that_fail_stop_no_other_and_are_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check

    def breaks(one: Any) -> dict[str, Any]:
        raise RuntimeError("broken")

    parts = {
        "a": ("tests", breaks, 9.0),
        "b": ("trainer", lambda one: {"verdict": "failed", "reason": "slow"}, 9.0),
        "c": ("countdown", lambda one: {"verdict": "passed"}, 9.0),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    options = argparse.Namespace(
        out=tmp_path, state=None, parts=["c", "a", "b"], seconds=60.0, device="cpu", small=True
    )
    (tmp_path / "work").mkdir()
    assert gpu_check.check(options, tmp_path / "work") == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(found["parts"]) == ["tests", "trainer", "countdown"], "in the order of PARTS"
    assert [part["verdict"] for part in found["parts"].values()] == ["failed", "failed", "passed"]
    assert found["parts"]["tests"]["reason"] == "RuntimeError: broken"
    assert found["machine"]["versions"]["torch"] and found["device"] == "cpu" and found["card"] is None
    options.parts = ["c"]
    assert gpu_check.check(options, tmp_path / "work") == 0
    options.seconds = 12.0  # two of these are for the parts, the rest is kept for the end
    assert gpu_check.check(options, tmp_path / "work") == 0
    assert "no time" in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["countdown"]["reason"]


def test_a_command_is_stopped_at_its_time_and_its_children_with_it(tmp_path: Path) -> None:
    from gpu_parts import run

    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    one = check(tmp_path, seconds=2.0)
    done = run(one, "-c", code + "print(p.pid, flush=True); time.sleep(60)")
    assert done.code is None
    assert done.failure is not None and "stopped at its time" in done.failure["reason"]
    pid = int(done.output.split()[0])
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_commands_failure_is_its_last_line(tmp_path: Path) -> None:
    from gpu_parts import run

    done = run(check(tmp_path), "-c", "print('first'); raise SystemExit('the reason')")
    assert done.failure is not None
    assert (done.failure["verdict"], done.failure["reason"]) == ("failed", "exit code 1: the reason")
    assert run(check(tmp_path, name="two"), "-c", "print(1)").failure is None


def test_generation_that_is_not_done_in_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large case may exceed its time. The tiny case may not, and a case that breaks is a failure."""
    import gpu_parts

    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "bench_generation.py").write_text("")
    monkeypatch.setattr(gpu_parts, "REPOSITORY", tmp_path)
    codes: dict[str, int | None] = {}

    def measured(one: Any, script: Any, *command: Any) -> Any:
        case, out = command[command.index("--case") + 1], command[command.index("--out") + 1]
        if codes[case] == 0:
            out.write_text(json.dumps({"case": case}))
        return gpu_parts.Done(codes[case], "the reason")

    monkeypatch.setattr(gpu_parts, "run", measured)
    for place, (tiny, large, verdict) in enumerate(
        [(0, 0, "passed"), (0, None, "passed"), (0, 1, "failed"), (None, 0, "failed"), (1, None, "failed")]
    ):
        codes |= {"countdown": tiny, "qwen3-0.6b": large}
        one = check(tmp_path, name=f"check{place}")
        found = gpu_parts.generation(gpu_parts.Check("cuda", False, one.out, one.work, None, one.until))
        assert found["verdict"] == verdict
        assert ("not done in time" in found["reason"]) == (None in (tiny, large))
        assert set(found["numbers"]) == {case for case, code in codes.items() if code == 0}


# -- figures beside the published ones -------------------------------------------------------------------------


def test_flops_are_counted_as_the_published_figures_count_them() -> None:
    """The MFU follows from tokens per second as in prime-rl, for both lengths, on 989 TFLOP/s."""
    import bench_trainer

    for name, published in bench_trainer.PUBLISHED.items():
        flops = bench_trainer.flops_per_token(bench_trainer.SHAPE, bench_trainer.POINTS[name]["tokens"])
        assert published["tokens_per_second"] * flops / 989e12 == pytest.approx(published["mfu"], rel=2e-3)


def test_the_shape_is_qwen3s() -> None:
    """The shape has 0.6B parameters, as many as the published model's config gives."""
    import torch
    from bench_trainer import SHAPE
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    assert sum(parameter.numel() for parameter in model.parameters()) == 596_049_920


def test_ahead_is_the_best_setting_with_recomputation() -> None:
    from gpu_parts import ahead_of

    published = {"tokens_per_second": 100.0, "mfu": 0.1, "peak_gib": 10.0}

    def point(speed: float, recompute: bool = True, peak: float = 9.0) -> dict[str, Any]:
        return {"tokens_per_second": speed, "mfu": speed / 1000, "peak_gib": peak, "recompute": recompute}

    measured = {"16k": point(90), "16k compiled": point(120, peak=11.0), "16k without recomputation": point(500, False)}
    assert ahead_of(published, measured, "16k") == {"tokens_per_second": True, "mfu": True, "peak_gib": False}
    assert ahead_of(published, measured, "64k") == {}


# -- state of the claims ---------------------------------------------------------------------------------------


def finished_run(root: Path, name: str) -> None:
    folder = root / "runs" / name
    (folder / "evaluations" / "iteration-000001").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "big.ckpt").write_bytes(b"0" * 100)
    (folder / "evaluations" / "iteration-000001" / "results.json").write_text("{}")
    for file in ("compare.json", "summary.json", "metrics.csv"):
        (folder / file).write_text(f"{file} of {name}")


def test_state_is_carried_in_parts_without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_claims

    monkeypatch.setattr(gpu_claims, "PART_BYTES", 400_000)
    one = check(tmp_path)
    policy = one.work / "cache" / "countdown-llama-abc"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text('{"num_hidden_layers": 8}')
    (policy / "model.safetensors").write_bytes(os.urandom(900_000))
    of_another_part = one.work / "cache" / "countdown-llama-tiny"
    of_another_part.mkdir()
    (of_another_part / "config.json").write_text('{"num_hidden_layers": 3}')
    finished_run(gpu_claims.root(one), "grpo-seed1")
    unfinished = gpu_claims.root(one) / "runs" / "popo-seed1"
    unfinished.mkdir()
    (unfinished / "metrics.csv").write_text("half")
    (gpu_claims.root(one) / "report.md").write_text("old")
    assert gpu_claims.keep_state(one) == ["state-0.part", "state-1.part", "state-2.part"]
    two = check(tmp_path, state=one.out, name="two")
    assert gpu_claims.take_state(two) == 1
    assert (two.work / "cache" / policy.name / "model.safetensors").read_bytes() == (
        policy / "model.safetensors"
    ).read_bytes()
    taken = sorted(str(path.relative_to(two.work)) for path in two.work.rglob("*") if path.is_file())
    assert [path for path in taken if path.startswith("claims")] == [
        f"claims/runs/grpo-seed1/{name}"
        for name in ("compare.json", "evaluations/iteration-000001/results.json", "metrics.csv", "summary.json")
    ]
    assert not (two.work / "cache" / of_another_part.name).exists()
    assert gpu_claims.take_state(check(tmp_path, state=tmp_path, name="three")) == 0
    monkeypatch.setattr(gpu_claims, "PART_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 3 files"):
        gpu_claims.keep_state(one)


def test_the_page_states_how_much_a_call_writes() -> None:
    import gpu_check
    import gpu_claims

    page = " ".join((REPOSITORY / "benchmarks" / "gpu" / "README.md").read_text(encoding="utf-8").split())
    assert (gpu_claims.MAX_PARTS, gpu_claims.PART_BYTES) == (3, 15 * 2**20)
    assert "at most three `state-*.part` of at most 15 MiB: eight files in all" in page  # four plots and one JSON
    assert all(f"| {letter} | " in page for letter in gpu_check.PARTS)


@pytest.mark.parametrize(("share", "word"), [(0.05, "raise"), (0.6, "lower")])
def test_a_policy_of_another_effective_share_stops_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, word: str
) -> None:
    import gpu_claims
    from gpu_parts import Check, Done

    def measured(one: Any, *command: Any, **more: Any) -> Done:
        assert command[0] == "scripts/effective_share.py", "no run begins"
        (one.work / "share.json").write_text(json.dumps({"effective_share": share}))
        return Done(0, "")

    monkeypatch.setattr(gpu_claims, "run", measured)
    small = check(tmp_path)
    found = gpu_claims.claims(Check("cpu", False, small.out, small.work, None, small.until))
    assert found["verdict"] == "failed"
    assert f"{share:.3f}" in found["reason"] and word in found["reason"]


@pytest.mark.slow
def test_the_claims_policy_lies_between_the_limits_whatever_it_learns() -> None:
    """The bounds are both ends of what a policy that writes true steps can do."""
    from effective_share import bounds
    from gpu_claims import CONFIG, SHARE

    config = yaml.safe_load((REPOSITORY / CONFIG).read_text())
    asked = CountdownSteps(**config["data"]["task"]["init_args"]).train_problems()
    asked = random.Random(0).sample(asked, 500)
    without_aim, as_shown = bounds(asked, config["model"]["warm_start"]["init_args"], config["data"]["group_size"])
    assert SHARE[0] < without_aim < as_shown < SHARE[1] + 0.02


def test_the_claims_config_is_taken_by_popo_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go seed by seed, so that whole pairs finish first. The files of carried runs stay below the limit."""
    from popo_lightning.cli.compare.command import parsed
    from popo_lightning.cli.compare.plan import plan

    monkeypatch.chdir(REPOSITORY)
    comparison = parsed(["--config", "configs/compare/gpu_claims.yaml"])
    comparison.check()
    runs = plan(comparison)
    methods = list(comparison.methods)
    assert [(run.seed, run.arm.method) for run in runs[:8]] == [(s, m) for s in (1, 2) for m in methods]
    assert comparison.at_once % len(methods) == 0, "whole seeds at once"
    assert len(comparison.seeds) >= 5


# -- the whole -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_script_on_the_cpu_and_again_with_its_state(tmp_path: Path) -> None:
    script = ["bash", str(REPOSITORY / "scripts" / "gpu_check.sh")]
    settings = ["--device", "cpu", "--small", "--seconds", "1500"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, str(tmp_path / "one"), *settings], env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "one" / "gpu_check.json").read_text())
    parts = found["parts"]
    verdicts = {name: part["verdict"] for name, part in parts.items()}
    assert done.returncode == 0, (verdicts, done.stdout[-3000:])
    assert list(parts) == ["tests", "trainer", "countdown", "memory", "generation", "claims"]
    assert {verdicts.pop("generation")} <= {"passed", "skipped"}
    assert set(verdicts.values()) == {"passed"}
    assert parts["tests"]["numbers"]["passed"] > 0
    measured = {point["point"]: point for point in parts["trainer"]["numbers"]["points"]}
    assert measured["16k"]["tokens_per_second"] > 0 and measured["64k"]["gradient_norms"][0] > 0
    assert len(parts["countdown"]["curve"]["step"]) == 4
    assert parts["claims"]["numbers"]["policy"]["effective_share"] > 0
    assert [run["method"] for run in parts["claims"]["numbers"]["finished"]] == ["grpo", "popo"]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["claims.png", "countdown.png", "gpu_check.json", "memory.png", "state-0.part", "trainer.png"]
    assert all(path.stat().st_size < 16 * 2**20 for path in (tmp_path / "one").iterdir())
    again = [*script, str(tmp_path / "two"), str(tmp_path / "one"), *settings, "--parts", "e"]
    assert subprocess.run(again, env=environment, capture_output=True).returncode == 0
    resumed = json.loads((tmp_path / "two" / "gpu_check.json").read_text())["parts"]["claims"]
    assert resumed["numbers"]["runs_taken_over"] == 2
    first, second = (found["numbers"]["policy"]["build_seconds"] for found in (parts["claims"], resumed))
    assert second < first / 4, "the policy came with the state"
