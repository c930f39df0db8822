"""The model card of an exported folder, and its upload to the hub."""

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
from helpers.exports import exported, refused, said_by, same_bits
from helpers.tiny_models import method, popo
from huggingface_hub import ModelCard

from popo_lightning import __version__
from popo_lightning.cli.export.base_model import BaseModel, base_model, weights_folder
from popo_lightning.cli.export.export_command import NotTakenError, push
from popo_lightning.cli.export.exported_folder import last_measured
from popo_lightning.cli.export.model_card import Told, model_card
from popo_lightning.cli.export.policy_loading import _reference
from popo_lightning.cli.export.saved_policy import SavedPolicy, saved_policy
from popo_lightning.core.errors import SettingError
from popo_lightning.model.loading import load_model
from popo_lightning.model.policy_checkpoint import FOLDER, REVISION, origin
from popo_lightning.policy import PolicyModule
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
    """The second iteration has its own evaluation. The first has only the one before training, not a later one."""
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
    """The checkpoint's history ends before its own evaluation, which comes after the checkpoint is saved."""
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
    """Names and settings may come from a stranger."""
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


def test_secrets_are_not_in_the_card(run: Path) -> None:
    saved = saved_policy(str(run))
    assert saved.record is not None
    record = replace(
        saved.record,
        settings={**saved.record.settings, "data.composer.api_key": '"S3"', "data.composer.auth": '{"token": "S3"}'},
        command="""popo fit --trainer.logger '{"init_args": {"api_key": "S3"}}' --a.token S3""",
    )
    forged = SavedPolicy(saved.checkpoint, run, {"callbacks": {"RunKeeper": {"run": record.to_plain(), "folder": "a"}}})
    page = model_card(
        Told(forged, BaseModel("a", Path("a"), None, None), "float32", False, "popo export --token S3", None)
    )
    assert "--a.token (not shown)\npopo export --token (not shown)" in page and "S3" not in page


def front_matter_of(page: str) -> dict[str, Any]:
    """Reads the front matter with the hub's own reader."""
    found: dict[str, Any] = ModelCard(page, ignore_metadata_errors=False).data.to_dict()
    return found


def test_a_base_on_the_hub_is_named_with_its_revision(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is the one that the run recorded, whatever the hub has now."""
    saved = saved_policy(str(run))
    record = new_record("gsm8k", "popo", 1, {"model.path": '"owner/model"'}, None)
    state = {**saved.state, REVISION: "0123abcd", "callbacks": {"RunKeeper": {"run": record.to_plain(), "folder": "a"}}}
    asked: list[Any] = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, "*.safetensors" in allow_patterns))
        return f"cache/{revision or 'newest'}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # a folder of the same name is another model
    found = base_model(SavedPolicy(saved.checkpoint, None, state))
    assert found == BaseModel("owner/model", Path("cache/0123abcd"), "0123abcd", "owner/model")
    assert base_model(saved, "owner/other").revision == "newest"
    assert asked == [("owner/model", "0123abcd", False), ("owner/other", None, False)]
    page = model_card(Told(saved, found, "float32", False, "", None))
    assert front_matter(page)["base_model"] == "owner/model" and "0123abcd" in page


def test_a_folder_of_the_run_is_no_hub_id(
    run: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative model.path, which looks like one, from another folder."""
    saved = saved_policy(str(run))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub is asked"))
    record = new_record("t", "m", 1, {"model.path": json.dumps(f"{policy.parent.name}/{policy.name}")}, None)
    kept = {"callbacks": {"RunKeeper": {"run": record.to_plain(), "folder": "a"}}}
    monkeypatch.chdir(policy.parent.parent)
    noted = origin(f"{policy.parent.name}/{policy.name}")
    assert noted == {REVISION: None, FOLDER: str(policy)}
    monkeypatch.chdir(tmp_path)
    assert base_model(SavedPolicy(saved.checkpoint, None, kept | noted)) == BaseModel(policy.name, policy, None, None)
    for gone in ({REVISION: None, FOLDER: str(tmp_path / "gone")}, {REVISION: None}, {}):
        with pytest.raises(SettingError, match=r"no longer there, .* by --base"):
            base_model(SavedPolicy(saved.checkpoint, None, kept | gone))


def test_weights_of_the_hub_are_those_of_the_revision(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision, allow_patterns[-1]))
        return str(policy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    began = BaseModel("owner/model", Path("a"), "0123abcd", "owner/model")
    module = PolicyModule(path="owner/model")
    heads = [model.lm_head.weight.detach() for model in (_reference(module, began), load_model(policy, torch.float32))]
    assert same_bits(*heads)
    assert asked == [("owner/model", "0123abcd", "*.safetensors")]
    asked.clear()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))  # one with weights of torch's own form
    weights_folder(began)
    assert [kind for _, _, kind in asked] == ["*.safetensors", "*.bin"]


# -- the hub ---------------------------------------------------------------------------------------------------


class Hub:
    """Records the calls of a client."""

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
    with pytest.raises(NotTakenError, match=r"try again by: hf upload me/mine 'a folder'$"):
        push(Path("a folder"), "me/mine")
    code, _, err = said_by("export", run, tmp_path / "out", "--push_to_hub", "me/mine")
    assert (
        code == 1
        and "is whole, but the hub did not take it" in err
        and (tmp_path / "out" / "model.safetensors").exists()
    )
    hub.fails = KeyboardInterrupt()
    code, _, err = said_by("export", run, tmp_path / "stopped", "--push_to_hub", "me/mine")
    assert code == 130 and "is whole, but not uploaded" in err
