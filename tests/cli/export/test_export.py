"""popo export: the folder has the policy's bits and loads without this package. An incomplete export leaves nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import (
    PLAIN,
    answers_by,
    as_shards,
    exported,
    greedy_rows,
    newest,
    policy_weights,
    refused,
    said_by,
    same_bits,
    tensors,
)
from helpers.tiny_models import byte_tokenizer, environment, method, popo, random_model

from popo_lightning.cli.export import new_folder
from popo_lightning.cli.export.new_folder import check_room, written_beside
from popo_lightning.core.errors import SettingError

LIMIT = 10  # data.max_new_tokens of the runs


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a finished run of two iterations."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    popo("fit", "--config", config, *method("popo"), "--run.folder", folder, "--trainer.max_epochs", 2)
    return folder


def test_every_tensor_has_the_bits_of_the_checkpoint(run: Path, policy: Path, tmp_path: Path) -> None:
    said = exported(run, tmp_path / "out")
    assert newest(run).name in said and "after iteration 2" in said
    found, kept = tensors(tmp_path / "out"), policy_weights(newest(run))
    assert found.keys() == kept.keys() - {"lm_head.weight"}, "the head is tied"
    assert all(same_bits(tensor, kept[name]) for name, tensor in found.items())
    assert not all(same_bits(tensor, tensors(policy)[name]) for name, tensor in found.items()), "nothing was trained"
    assert not list(tmp_path.glob(".*")), "a draft is left"


def test_a_folder_of_shards_gives_the_same(run: Path, tmp_path: Path) -> None:
    shards = as_shards(newest(run), tmp_path / "iteration-0002.ckpt")
    exported(run, tmp_path / "from file")
    exported(shards, tmp_path / "from shards")
    one, other = tensors(tmp_path / "from file"), tensors(tmp_path / "from shards")
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def test_plain_transformers_gives_the_greedy_answers_of_the_last_evaluation(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")
    rows = greedy_rows(run)
    (found,) = answers_by(PLAIN, tmp_path / "out", LIMIT, [row["prompt"] for row in rows], tmp_path)
    assert len(rows) == 12 and found == [row["response"] for row in rows]
    assert len({row["response"] for row in rows}) > 3


@pytest.mark.slow
def test_untied_heads_in_several_files(tmp_path: Path) -> None:
    """There is also a chat template, and the exported tokenizer formats prompts as the base's did."""
    base = random_model("llama-untied", tmp_path / "base", byte_tokenizer())
    task = "popo_lightning.toys.arithmetic.Arithmetic"
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "run": {"task": "sums", "folder": str(tmp_path / "run")},
                "model": {"path": str(base), "optimizer": "torch.optim.AdamW"},
                "data": {
                    "task": {"class_path": task, "init_args": {"held_out_per_kind": 2, "system": "Add."}},
                    "engine": "popo_lightning.engines.transformers.TransformersEngine",
                    **{"problems_per_iteration": 4, "group_size": 2, "minibatches": 1, "max_new_tokens": LIMIT},
                },
                "evaluation": {"samples": 0},
                "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1},
            }
        )
    )
    popo("fit", "--config", config, *method("any_group"))
    from popo_lightning.cli.export.exported_folder import export

    export(str(tmp_path / "run"), tmp_path / "out", "popo export", shard_bytes=50_000)
    found, kept = tensors(tmp_path / "out"), policy_weights(newest(tmp_path / "run"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert found.keys() == kept.keys() and all(same_bits(tensor, kept[name]) for name, tensor in found.items())
    rows = greedy_rows(tmp_path / "run")
    (answers,) = answers_by(PLAIN, tmp_path / "out", LIMIT, [row["prompt"] for row in rows], tmp_path)
    assert answers == [row["response"] for row in rows] and len(rows) == 4
    assert {"role": "system", "content": "Add."} in rows[0]["prompt"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_that_of_weights_and_configuration(run: Path, tmp_path: Path, dtype: str) -> None:
    exported(run, tmp_path / "out", "--dtype", dtype)
    wide: torch.dtype = getattr(torch, dtype)
    kept = policy_weights(newest(run))
    assert all(same_bits(tensor, kept[name].to(wide)) for name, tensor in tensors(tmp_path / "out").items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_generation_config_has_the_runs_sampling_and_ends(run: Path, tmp_path: Path) -> None:
    """The base model's own may set a repetition penalty, which evaluations did not use."""
    exported(run, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["do_sample"], found["temperature"], found["top_k"], found["top_p"]) == (True, 1.0, 0, 1.0)
    assert found["eos_token_id"] == [1] and "repetition_penalty" not in found


def test_the_base_may_have_moved(run: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "empty"))
    said = refused("export", run, tmp_path / "out")
    assert "no longer in" in said and "--base" in said and not (tmp_path / "empty").exists(), "nothing was built"
    exported(run, tmp_path / "out", "--base", policy)
    assert tensors(tmp_path / "out")
    said = refused("export", run, tmp_path / "other", "--base", random_model("llama-untied", tmp_path / "another"))
    assert "another model" in said


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_there_is_nothing_to_export_from(run: Path, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    empty = tmp_path / "without"
    (empty / "checkpoints").mkdir(parents=True)
    (tmp_path / "text.ckpt").write_text("hello")
    out = tmp_path / "out"
    for source, words in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "nothing": "no run's",
        policy: "a model folder",
        empty: "no whole checkpoint",
        tmp_path / "text.ckpt": "cannot be read",
    }.items():
        assert words in refused("export", source, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_places_that_are_taken_and_words_that_are_unknown(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert "not empty" in refused("export", run, tmp_path / "full")
    assert "which is a file" in refused("export", run, tmp_path / "full" / "mine")
    said = refused("export", run, tmp_path / "out", "--dtype", "int8")
    assert "--dtype: invalid choice: 'int8' (choose from" in said and "bfloat16" in said
    assert "did you mean --dtype?" in refused("export", run, tmp_path / "out", "--dtpye=float32")
    assert "popo export needs FOLDER" in refused("export", run)
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    exported(run, tmp_path / "empty")
    assert tensors(tmp_path / "empty")


def test_a_disk_without_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    monkeypatch.setattr("popo_lightning.cli.export.adapted_policy.weights_of", None)  # weights are not even read
    said = refused("export", run, tmp_path / "out")
    assert "1 MiB free" in said and not list(tmp_path.iterdir())
    with pytest.raises(SettingError, match="2 GiB"):
        check_room(tmp_path / "deep" / "er", 2**31)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(SettingError, match=r"No space left on device.*make room"),
        written_beside(tmp_path / "out") as draft,
    ):
        (draft / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from popo_lightning.cli.export.new_folder import written_beside
with written_beside(Path(sys.argv[1])) as draft:
    (draft / "config.json").write_text("{}")
    print("writing", flush=True)
    time.sleep(60)
"""
    target = tmp_path / "out"
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        with pytest.raises(SettingError, match="another export is writing"), written_beside(target):
            pass
        writer.send_signal(signal.SIGKILL)
    assert not target.exists() and [path.name for path in tmp_path.iterdir()] == [".out.draft"]
    with written_beside(target) as draft:
        assert not list(draft.iterdir()), "what the other wrote is still there"
        (draft / "whole").write_text("all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (target / "whole").exists()


def test_ctrl_c_while_writing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("popo_lightning.cli.export.exported_folder.model_card", stopped)
    code, _, err = said_by("export", run, tmp_path / "out")
    assert code == 130 and "out was not written" in err and not list(tmp_path.iterdir())


def test_memory_holds_the_weights_of_a_file_once(tmp_path: Path) -> None:
    """The tensors of the model are those of the checkpoint, which stay on disk until they are written."""
    from transformers import AutoConfig

    from popo_lightning.cli.export.rebuilt_model import cast, rebuilt

    base = random_model("llama-tied", tmp_path / "base")
    weights = tensors(base)
    model = rebuilt(AutoConfig.from_pretrained(base), weights)
    places = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == places
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cast(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    weights["model.norm.weight"].fill_(1e5)
    model = rebuilt(AutoConfig.from_pretrained(base), weights)
    with pytest.raises(SettingError, match=r"ends at 65504.*model\.norm\.weight"):
        cast(model, torch.float16)


def test_closing_words_name_the_command(run: Path, config: Path, tmp_path: Path, capfd: Any) -> None:
    popo("fit", "--config", config, *method("grpo"), "--run.folder", tmp_path / "a b", "--trainer.max_epochs", 1)
    said = capfd.readouterr().err
    assert f"popo export '{tmp_path}/a b' '{tmp_path}/a b/exported'" in said
    none = ["--checkpoint.save_top_k", 0, "--run.folder", tmp_path / "none"]
    popo("fit", "--config", config, *method("grpo"), *none, "--trainer.max_epochs", 1)
    assert "popo export" not in capfd.readouterr().err
