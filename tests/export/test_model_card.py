"""The model card of an exported folder, and its way to the hub."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.exports import exported, refused, said_by
from helpers.tiny_models import method, popo
from huggingface_hub import ModelCard

from popo_lightning import __version__
from popo_lightning.export.base_model import BaseModel, base_model
from popo_lightning.export.evaluations import last_measured
from popo_lightning.export.model_card import Told, model_card
from popo_lightning.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.model.policy_checkpoint import REVISION
from popo_lightning.runs.record import new_record


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "run"
    more = ["--trainer.max_epochs", 3, "--checkpoint.every_n_epochs", 1, "--checkpoint.save_top_k", -1]
    popo("fit", "--config", config, *method("popo"), "--run.folder", folder, *more)
    return folder


def numbers_after(run: Path, iteration: int) -> dict[str, float]:
    content = json.loads((run / "evaluations" / f"iteration-{iteration:06d}" / "results.json").read_text())
    found: dict[str, float] = content["benchmarks"]["countdown"]["numbers"]
    return found


def front_matter(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page.split("---")[1])
    return found


def test_front_matter_and_text(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "--dtype", "bfloat16")
    page = (tmp_path / "out" / "README.md").read_text()
    found, numbers = front_matter(page), numbers_after(run, 3)
    own = found["popo_lightning"]
    assert (own["version"], own["method"], own["task"], own["seed"]) == (__version__, "popo", "tiny", 1)
    assert own["base_model"] == "countdown-llama" and len(own["base_model_revision"]) == 12 and own["iterations"] == 3
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert "base_model" not in found, "the hub knows no such model"
    (result,) = found["model-index"][0]["results"]
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured == {name: numbers[name] for name in ("greedy", "avg_at_2", "pass_at_2")}
    for words in ("after iteration 3: of these weights", "`bfloat16`", "`0.002`", "behave_weight:", "popo export "):
        assert words in page
    assert f"--run.folder {run}" in page and "popo fit --config" in page, "the command that made it"


def test_an_evaluation_of_other_weights_is_said_to_be_one(run: Path) -> None:
    """The second iteration has an evaluation, the first has the one before training alone, and no later one counts."""
    saved = [saved_policy(str(path)) for path in (run / "checkpoints").glob("*.ckpt")]
    by_iteration = {each.iterations: each for each in saved}
    assert by_iteration.keys() == {1, 2, 3}
    first, second = last_measured(by_iteration[1]), last_measured(by_iteration[2])
    assert first is not None and first.iteration == 0 and second is not None and second.iteration == 2
    assert second.benchmarks["countdown"]["greedy"] == numbers_after(run, 2)["greedy"]
    base = BaseModel("a", Path("a"), None, None)
    told = Told(by_iteration[1], base, "float32", False, "", first)
    assert "after iteration 0: of earlier weights" in model_card(told)
    assert "None was made" in model_card(replace(told, measured=None))


def test_without_its_run_the_checkpoint_tells_what_it_knows(run: Path, tmp_path: Path) -> None:
    """Its history ends before its own evaluation, which comes after it was saved."""
    last = saved_policy(str(run))
    shutil.copy(last.checkpoint, tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state["callbacks"]["RunKeeper"]["folder"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "a.ckpt")
    alone = saved_policy(str(tmp_path / "a.ckpt"))
    found = last_measured(alone)
    assert alone.run is None and found is not None and found.iteration == 2
    assert found.benchmarks["countdown"]["greedy"] == numbers_after(run, 2)["greedy"]


def test_damaged_reports_are_passed_over(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    odd = '{"benchmarks": {"a": {"numbers": {}, "settings": 5}}, "iteration": 3}'
    for content in ("{", "[]", '{"benchmarks": 3}', odd):
        (copy / "evaluations" / "iteration-000003" / "results.json").write_text(content)
        found = last_measured(saved_policy(str(copy)))
        assert found is not None and found.iteration == 2


def test_no_text_breaks_out_of_the_page(run: Path) -> None:
    """Names and settings are a stranger's."""
    hostile = "x`|\n---\n# a\n```\n<script>"
    saved = saved_policy(str(run))
    record = new_record(hostile, hostile, 1, {"data.task.init_args.system": json.dumps(hostile)}, None)
    told = Told(saved, BaseModel(hostile, Path("a"), hostile, None), "float32", False, "popo export", None)
    keeper = {"run": replace(record, command=hostile).to_plain(), "folder": "a"}
    forged = SavedPolicy(saved.checkpoint, saved.run, {"callbacks": {"RunKeeper": keeper}})
    page = model_card(replace(told, saved=forged))
    assert front_matter_of(page)["popo_lightning"]["task"] == hostile
    text = page.split("\n---\n", 1)[1]
    fences = re.compile(r"^(`{3,})\w*\n.*?^\1$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
    outside = fences.sub("", text)
    assert "script" not in outside and "# a" not in outside and outside.count("\n#") == text.count("\n## ") + 1


def front_matter_of(page: str) -> dict[str, Any]:
    """By the hub's own reader."""
    found: dict[str, Any] = ModelCard(page, ignore_metadata_errors=False).data.to_dict()
    return found


def test_a_base_on_the_hub_is_named_with_its_revision(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run recorded it, whatever the hub has now."""
    saved = saved_policy(str(run))
    record = new_record("gsm8k", "popo", 1, {"model.path": '"owner/model"'}, None)
    state = {**saved.state, REVISION: "0123abcd", "callbacks": {"RunKeeper": {"run": record.to_plain(), "folder": "a"}}}
    asked: list[Any] = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, "*.safetensors" in allow_patterns))
        return f"cache/{revision or 'newest'}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = base_model(SavedPolicy(saved.checkpoint, None, state))
    assert found == BaseModel("owner/model", Path("cache/0123abcd"), "0123abcd", "owner/model")
    assert base_model(saved, "owner/other").revision == "newest"
    assert asked == [("owner/model", "0123abcd", False), ("owner/other", None, False)]
    page = model_card(Told(saved, found, "float32", False, "", None))
    assert front_matter(page)["base_model"] == "owner/model" and "0123abcd" in page


# -- the hub ---------------------------------------------------------------------------------------------------


class Hub:
    """Notes what a client is asked for."""

    calls: list[tuple[Any, ...]]
    refuses = False

    def whoami(self) -> dict[str, str]:
        if self.refuses:
            raise OSError("no token")
        return {"name": "me"}

    def create_repo(self, name: str, **settings: Any) -> Any:
        self.calls.append(("create", name, settings))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        if self.fails is not None:
            raise self.fails
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    fails: BaseException | None = None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    kind = type("ThisHub", (Hub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", kind)
    return kind


def test_the_whole_folder_goes_to_a_private_repository(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    exported(run, tmp_path / "out", "--push_to_hub", "me/mine")
    create, upload = hub.calls
    assert create == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert upload[1] == "me/mine" and {"README.md", "config.json", "model.safetensors"} <= set(upload[2])


def test_a_hub_that_refuses(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    assert "no name of a repository" in refused("export", run, tmp_path / "out", "--push_to_hub", "a/b/c")
    hub.refuses = True
    assert "hf auth login" in refused("export", run, tmp_path / "out", "--push_to_hub", "me/mine")
    assert not (tmp_path / "out").exists(), "asked before anything is written"
    hub.refuses, hub.fails = False, OSError("the line is cut")
    code, _, err = said_by("export", run, tmp_path / "out", "--push_to_hub", "me/mine")
    assert (
        code == 1
        and "is whole, but the hub did not take it" in err
        and (tmp_path / "out" / "model.safetensors").exists()
    )
    hub.fails = KeyboardInterrupt()
    code, _, err = said_by("export", run, tmp_path / "stopped", "--push_to_hub", "me/mine")
    assert code == 130 and "is whole, but not uploaded" in err
