"""popo estimate on a run: the same weights give the sample mean, and older responses get weights by a forward pass."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exports import exported, refused, said_by
from helpers.tiny_models import method, popo

from popo_lightning.cli.estimate.logged import evaluations_of, logged_benchmarks
from popo_lightning.core.errors import SettingError

K = 6


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains four iterations in small steps, evaluated and saved after 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("estimated") / "run"
    kept = ["--evaluation.keep_responses", "9", "--evaluation.samples", str(K), "--evaluation.new_draws", "true"]
    slow = ["--model.optimizer.init_args.lr", "3e-4", "--trainer.max_epochs", "4", "--checkpoint.every_n_epochs", "2"]
    popo(
        "fit",
        "--config",
        config,
        *method("popo"),
        "--run.folder",
        folder,
        *kept,
        *slow,
        "--checkpoint.save_top_k",
        "-1",
    )
    return folder


def evaluation(run: Path, iteration: int) -> Path:
    return run / "evaluations" / f"iteration-{iteration:06d}"


def checkpoint(run: Path, iteration: int) -> Path:
    (found,) = (run / "checkpoints").glob(f"iteration-{iteration:04d}.ckpt")
    return found


def kept_rows(run: Path, iteration: int) -> list[dict[str, Any]]:
    (file,) = evaluation(run, iteration).glob("*.jsonl")
    return [row for line in file.read_text().splitlines() if "token_ids" in (row := json.loads(line))]


def estimated(out: Path, *args: str | Path) -> dict[str, Any]:
    code, said, err = said_by("estimate", *args, "--json", out)
    assert code == 0, err
    (found,) = json.loads(out.read_text())["benchmarks"].values()
    return {**found, "said": said}


def test_the_same_weights_give_the_sample_mean(run: Path, tmp_path: Path) -> None:
    found = estimated(tmp_path / "x.json", run)
    rows = kept_rows(run, 4)
    assert (found["iterations"], found["problems"], found["responses"]) == ([4], 9, 9 * K) and len(rows) == 9 * K
    assert found["mean_weight"] == pytest.approx(1, abs=1e-4)  # engine and trainer differ by 1e-6 nats a token
    assert list(found["effective"].values()) == pytest.approx([K] * 9, abs=1e-4)
    accuracy = np.mean([row["acc"] for row in rows])
    assert found["sampled"]["value"] == pytest.approx(accuracy)
    for name, value in found["estimates"].items():
        assert value["value"] == pytest.approx(accuracy, abs=1e-4), name
    assert (
        f"{accuracy:.3f}" in found["said"]
        and "STAR (position)" in found["said"]
        and "geometric (biased)" in found["said"]
    )


def test_older_responses_are_weighted(run: Path, tmp_path: Path) -> None:
    """Compares with transformers alone, on the exported weights."""
    from transformers import AutoModelForCausalLM

    exported(run, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32")
    problems: dict[str, list[tuple[float, float]]] = defaultdict(list)
    prompts = {row["problem"]: row["prompt_ids"] for row in kept_rows(run, 2) if "prompt_ids" in row}
    for row in kept_rows(run, 2):
        prompt, answer = prompts[row["problem"]], row["token_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        chosen = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
        problems[row["problem"]].append((float(chosen) - sum(row["behave_logp"]), row["acc"]))
    found = estimated(tmp_path / "x.json", checkpoint(run, 4), "--from", evaluation(run, 2))
    again = estimated(tmp_path / "y.json", run, "--iteration", "2")
    assert found == again and found["iterations"] == [2]
    expected = []
    for name, pairs in problems.items():
        weights, right = np.exp([log for log, _ in pairs]), np.array([acc for _, acc in pairs])
        expected.append(weights @ right / weights.sum())
        assert found["effective"][name] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)
    assert found["estimates"]["importance sampling"]["value"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert abs(found["changes"]["importance sampling"]["value"]) > 1e-4, "else there was nothing to weight"


def test_responses_of_several_policies_and_another_temperature(run: Path, tmp_path: Path) -> None:
    pair = ["--iteration", "2", "--iteration", "4"]
    alike = tmp_path / "alike"
    shutil.copytree(run, alike)
    for number in (2, 4):
        file = evaluation(alike, number) / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"new_draws": False}))
    code, _, err = said_by("estimate", alike, *pair)
    assert code == 2 and "after iterations 2 and 4 have the same draws (evaluation.seed 0)" in err
    shutil.copytree(evaluation(run, 4), tmp_path / "again")  # new draws depend on the iteration
    code, _, err = said_by("estimate", run, "--from", evaluation(run, 4), "--from", tmp_path / "again")
    assert code == 2 and "after iterations 4 and 4 have the same draws" in err
    code, _, err = said_by("estimate", run, "--from", evaluation(run, 2), "--iteration", "4")
    assert code == 2 and "--iteration is 4, but --from is" in err
    both = estimated(tmp_path / "x.json", run, *pair)
    assert (both["iterations"], both["responses"]) == ([2, 4], 9 * 2 * K)
    warm = estimated(tmp_path / "y.json", run, "--temperature", "0.9")
    assert warm["temperature"] == 0.9 and warm["sampled_at"] == 1
    assert warm["estimates"]["importance sampling"]["value"] > warm["sampled"]["value"]
    choices = ["--abstraction", "time", "--last", "2", "--max_weight", "1.5", "--benchmark", "countdown"]
    assert "STAR (time, last 2 tokens, biased)" in estimated(tmp_path / "z.json", run, *choices)["said"]


def test_a_failed_grade_is_0_in_every_part(run: Path, tmp_path: Path) -> None:
    """The parts of the failed grade are only score and acc."""
    folder = tmp_path / "evaluations" / "iteration-000004"
    shutil.copytree(evaluation(run, 4), folder)
    (file,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["parts"]["brief"] = row["acc"]
    wrong = next(row for row in rows if "token_ids" in row and not row["acc"])
    wrong |= {"parts": {"score": 0.0, "acc": 0.0}, "failure": "the verifier took too long"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [estimated(tmp_path / "x.json", run, "--from", folder, "--reward", part) for part in ("acc", "brief")]
    assert found[0]["estimates"] == found[1]["estimates"]


def test_nothing_is_estimated_where_too_few_are_effective(run: Path, tmp_path: Path) -> None:
    """The policy of the responses differs by a factor of 20 from one response of a problem to the next."""
    other = tmp_path / "other"
    shutil.copytree(evaluation(run, 4), other)
    (file,) = other.glob("*.jsonl")
    rows = [row for line in file.read_text().splitlines() if "token_ids" in (row := json.loads(line))]
    for row in rows:
        row["behave_logp"][0] -= 3 * row["sample"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = said_by("estimate", run, "--from", other, "--json", tmp_path / "x.json")
    assert (code, out) == (2, "") and "have fewer than 2 effective responses" in err
    (found,) = json.loads((tmp_path / "x.json").read_text())["benchmarks"].values()
    assert found["refused"] and not found["estimates"] and found["share_unusable"] > 0.5


def test_what_cannot_be_estimated_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(evaluation(run, 4), other)
    (file,) = other.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]

    def changed(**fields: Any) -> None:
        file.write_text("".join(json.dumps(row | (fields if "token_ids" in row else {})) + "\n" for row in lines))

    changed(token_ids=[10**5] * 3, behave_logp=[-1.0] * 3)
    assert "in other tokens" in refused("estimate", run, "--from", other)
    changed(response="nothing of the kind")
    assert "in other tokens" in refused("estimate", run, "--from", other)
    for fields in (
        {"behave_logp": [-1.0]},
        {"behave_logp": [0.5], "token_ids": [1]},
        {"behave_logp": [float("nan")], "token_ids": [1]},
        {"token_ids": ["__import__('os')"]},
        {"token_ids": -1},
        {"parts": None},
        {"images": ["a.png"]},
        {"prompt_ids": [1]},
    ):
        changed(**fields)
        assert "is no kept response" in refused("estimate", run, "--from", other), fields
    file.write_text("[1]\n")
    assert "cannot be read as JSON lines" in refused("estimate", run, "--from", other)
    file.write_text("")
    assert "evaluation.keep_responses 500" in refused("estimate", run, "--from", other)
    assert "no responses of benchmark 'x'" in refused("estimate", run, "--benchmark", "x")
    assert "was evaluated after 0, 2, 4" in refused("estimate", run, "--iteration", "3")
    assert "is no run's folder" in refused("estimate", run, "--from", tmp_path / "none")
    assert "does not exist" in refused("estimate", tmp_path / "none")
    assert "--reward is 'x'" in refused("estimate", run, "--reward", "x")
    assert "above 0" in refused("estimate", run, "--temperature", "0")
    results = json.loads((other / "results.json").read_text())
    for settings, words in (({"top_p": 0.9}, "top_p 0.9"), ({"top_k": 5}, "top_k 5"), ({"temperature": 0}, "greedily")):
        changed()
        with_settings = json.loads(json.dumps(results))
        with_settings["benchmarks"]["countdown"]["settings"] |= settings
        (other / "results.json").write_text(json.dumps(with_settings))
        assert words in refused("estimate", run, "--from", other)


def test_a_checkpoint_looks_back(run: Path) -> None:
    """From its own run it uses the newest evaluation up to the checkpoint, from another run the newest one."""
    assert evaluations_of(str(run), [], 3) == [evaluation(run, 2)]
    assert evaluations_of(str(run), [], None) == [evaluation(run, 4)]
    assert evaluations_of(str(run), [4, 0], 2) == [evaluation(run, 0), evaluation(run, 4)]
    with pytest.raises(SettingError, match="no evaluation that is no newer"):
        evaluations_of(str(run), [], -1)
    (both,) = logged_benchmarks([evaluation(run, 0), evaluation(run, 2)])
    assert both.iterations == (0, 2) and {len(group.responses) for group in both.groups} == {2 * K}
