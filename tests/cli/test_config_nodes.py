"""Config files with valid YAML but invalid settings, and files that are not text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from popo_lightning.cli.config_files import LARGEST, check_config_files
from popo_lightning.cli.parser_sentences import GROUPS
from popo_lightning.core.errors import SettingError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
FILES = {  # content, and the sentence
    "data: &a {task: *a}\n": ["line 1 gives data.task itself as a part of it", "take the alias out"],
    BOMB: ["repeats aliases to more than 1000000 settings"],
    "data: {group_size: 010}\n": ["gives data.group_size 010, which YAML reads as 8", "write 8, or '010' in quotes"],
    "data: {group_size: 1:30}\n": ["gives data.group_size 1:30, which YAML reads as 90"],
    "data: {task: !!python/object/apply:os.getcwd []}\n": ["has the tag !!python/object/apply:os.getcwd"],
    "data: {group_size: !mine 4}\n": ["has the tag !mine, which settings do not take"],
    "on: 4\n": ["line 1 has the name on, which YAML reads as no text", "write it in quotes"],
    "data:\n  3: 4\n": ["line 2 has the name 3"],
    "data:\n  [1, 2]: 4\n": ["line 2 has a name that is no text"],
    "{a: 1}: 4\n": ["line 1 has a name that is no text"],
    "data:\n  <<: 4\n": ["line 2 is no YAML"],
    "data:\n  group_size:4\n": ["line 2 gives data no names", "with a space after the colon"],
    "modle: {}\n": ["line 1 has 'modle', which is no group of settings", "did you mean model?"],
    "data: [4]\n": ["line 1 gives data no names"],
    "data: 4\n": ["line 1 gives data no names"],
    "data: {composer: {class_path: 4}}\n": ["gives data.composer.class_path no text", "package.module.Class"],
    "data: {composer: {class_path: a.B, init_args: null}}\n": [
        "gives data.composer.init_args no names",
        "leave it out",
    ],
    "data: {composer: {class_path: a.B, init_args: [1]}}\n": ["gives data.composer.init_args no names"],
    f"data: {{group_size: {'9' * 5000}}}\n": ["has a value that is none"],
    "data: " + "[" * 3000 + "]" * 3000 + "\n": ["brackets are nested too deeply"],
}


def said_of(file: Path) -> str:
    with pytest.raises(SettingError) as refused:
        check_config_files(["--config", str(file)], GROUPS)
    print(sentence := str(refused.value))
    assert sentence.startswith(f"--config is '{file}', ") and "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.mark.parametrize("content", FILES, ids=lambda text: text[:40])
def test_a_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(content)
    sentence = said_of(file)
    assert [word for word in FILES[content] if word not in sentence] == []


def test_what_yaml_reads_oddly_is_what_the_sentence_says() -> None:
    assert yaml.safe_load("[010, 1:30]") == [8, 90]


def test_files_that_are_fine(tmp_path: Path) -> None:
    for number, content in enumerate(
        [
            "data: {group_size: &k 4, minibatches: *k}\n",
            "data:\n  <<: {group_size: 4}\n  ppo_epochs: 1\n",
            "evaluation: {benchmarks: {2024: {samples: 0}}}\ntrainer: {max_time: 00:12:00:00}\n",
            "\ufeffdata: {group_size: 4}\n",
            "data: {sampler: {class_path: a.B}, stop: ['010', 'on'], temperature: 1.0e-1, async_level: 0}\n",
        ]
    ):
        (tmp_path / f"{number}.yaml").write_text(content)
        check_config_files(["--config", str(tmp_path / f"{number}.yaml")], GROUPS)


def test_files_that_hold_no_settings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in said_of(tmp_path / "pipe")
    assert "a device or a pipe" in said_of(Path("/dev/null"))
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(LARGEST + 1)
    assert "too many for settings" in said_of(tmp_path / "weights")
    (tmp_path / "latin1.yaml").write_bytes("run: {task: café}\n".encode("latin-1"))
    assert "write one in UTF-8" in said_of(tmp_path / "latin1.yaml")
    with pytest.raises(SettingError, match="--config is empty, which names no file"):
        check_config_files(["--config", ""], GROUPS)
