"""A model folder with a missing or damaged file gives one sentence that names the file, before anything loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import popo, tiny_policy
from safetensors.torch import load_file, save_file

from popo_lightning.core.errors import SettingError, reason, shortened
from popo_lightning.model.files import check_model_files
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.policy import PolicyModule

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def halved(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def removed(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for part, file in enumerate(("model-00001-of-00002.safetensors", SECOND)):
        mine = names[part * len(names) // 2 : (part + 1) * len(names) // 2]
        save_file({name: weights[name] for name in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def after(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        for step in steps:
            step(folder)

    return take


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "tokenizer cut": (halved("tokenizer.json"), ["whose tokenizer.json is damaged", "copy it there again"]),
    "tokenizer empty": (written("tokenizer.json", ""), ["tokenizer.json is damaged"]),
    "tokenizer of bytes": (written("tokenizer.json", b"\xff\xfe\x00"), ["tokenizer.json is damaged", "utf-8"]),
    "tokenizer list": (written("tokenizer.json", "[]"), ["tokenizer.json is damaged (it is no JSON object)"]),
    "tokenizer settings": (halved("tokenizer_config.json"), ["tokenizer_config.json is damaged"]),
    "config cut": (halved("config.json"), ["config.json is damaged"]),
    "config of words": (written("config.json", "not json"), ["config.json is damaged"]),
    "config list": (written("config.json", "[1]"), ["config.json is damaged"]),
    "no config": (removed("config.json"), ["a folder without config.json", "save_pretrained"]),
    "generation": (written("generation_config.json", '{"a": '), ["generation_config.json is damaged"]),
    "weights cut": (halved("model.safetensors"), ["model.safetensors is damaged"]),
    "weights empty": (written("model.safetensors", b""), ["model.safetensors is damaged"]),
    "weights of Git LFS": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"),
        ["model.safetensors is a pointer of Git LFS", "git lfs pull"],
    ),
    "shard missing": (after(shard, removed(SECOND)), [f"in which {SECOND} is missing (1 of 2 weight files)"]),
    "shard cut": (after(shard, halved(SECOND)), [f"whose {SECOND} is damaged"]),
    "index cut": (after(shard, halved(INDEX)), [f"whose {INDEX} is damaged"]),
    "index empty": (after(shard, written(INDEX, "{}")), [f"whose {INDEX} names no weights"]),
    "adapter": (
        after(written("adapter_config.json", "{}"), removed("config.json", "model.safetensors")),
        ["an adapter (it has an adapter_config.json) without its model", "merge_and_unload"],
    ),
    "run": (after(written("metrics.csv", ""), removed("config.json")), ["the folder of a run", "ckpt_path"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder(case: str, policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "model"))
    check_model_files(folder)
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(SettingError) as refused:
        PromptEncoder(folder, 16)
    sentence = str(refused.value)
    assert [word for word in (f"model.path is '{folder}', ", *words) if word not in sentence] == []
    assert "\n" not in sentence


def test_whole_folders(policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "model"))
    shard(folder)
    check_model_files(folder)
    check_model_files("some-org/some-model")  # a name on the hub


def test_what_is_no_folder(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "b.ckpt").write_bytes(b"")
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(SettingError, match=r"a checkpoint of a run; .*ckpt_path"):
            check_model_files(tmp_path / name)
    with pytest.raises(SettingError, match="a file; name the folder"):
        check_model_files(policy / "config.json")


def test_a_file_that_may_not_be_read(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(SettingError, match=r"config.json cannot be read .*Permission denied.*chmod"):
        check_model_files(policy)


def test_a_tokenizer_that_fails_in_another_way(policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingError, match="from which no tokenizer loads: KeyError"):
        PromptEncoder(folder, 16)
    assert reason(KeyError(1)) == "KeyError 1" and reason(ValueError()) == "ValueError"


def test_explanations_end_with_a_word() -> None:
    assert reason(ValueError("one two\nthree")) == "one two three" == reason(ValueError("one two three"), 13)
    assert reason(ValueError("one two three"), 12) == "one two …" == reason(ValueError("one two, three"), 12)
    assert shortened("a" * 20, 10) == "aaaaaaaaa…"


def test_an_empty_path() -> None:
    for path in ("", " "):
        with pytest.raises(SettingError, match=r"model.path is empty; give a model folder"):
            PolicyModule(path)


@pytest.mark.parametrize("name", ["run.root", "run.folder", "ckpt_path"])
def test_an_empty_place(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, f"--{name}", "")
    assert stopped.value.code == 2
    assert f"{name} is empty" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SettingError, match=r"model.warm_start cannot write .*file/cache.*POPO_CACHE"):
        tiny_policy().folder()
