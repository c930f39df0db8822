"""The task configurations parse with every method and read the data that they name."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.dataset import png
from helpers.places import REPOSITORY
from helpers.tiny_models import method, popo

from popo_lightning.tasks.dataset import DatasetTask
from tasks.test_dataset_files import REAL, needs_real

TASKS = ["math", "gsm8k", "countdown", "countdown4", "geometry"]
Args = list[str | Path]


def task_config(name: str) -> Args:
    return ["--config", REPOSITORY / "configs" / "task" / f"{name}.yaml"]


def printed(capsys: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    """Returns the configuration that a command would use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        popo("fit", *args, "--model.path", "somewhere", "--print_config")
    captured = capsys.readouterr()
    assert stopped.value.code == 0, captured.err
    config: dict[str, Any] = yaml.safe_load(captured.out)
    return config


def built(config: dict[str, Any], **changes: Any) -> DatasetTask:
    """Returns the task of a configuration."""
    settings = config["data"]["task"]["init_args"] | changes
    module, name = settings["verifier"]["class_path"].rsplit(".", 1)
    verifier = getattr(import_module(module), name)(**settings["verifier"].get("init_args", {}))
    return DatasetTask(**settings | {"verifier": verifier})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", TASKS)
def test_composes_with_a_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, *task_config(name), *method("popo"))
    assert (config["run"]["task"], config["run"]["method"]) == (name, "popo")
    assert "GroupReplay" in config["data"]["composer"]["class_path"]
    settings = config["data"]
    assert settings["problems_per_iteration"] % settings["minibatches"] == 0 and settings["group_size"] == 8
    assert config["evaluation"]["benchmarks"] is None or set(config["evaluation"]["benchmarks"]) <= set(
        settings["task"]["init_args"]["benchmarks"]
    )
    built(config)


@pytest.mark.parametrize("spelling", ["--data.task.folder", "--data.task.folder"])
@pytest.mark.parametrize("name", TASKS)
def test_local_replaces_the_sources_and_nothing_else(
    name: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = printed(capsys, *task_config(name), *method("popo"))
    local = printed(capsys, *task_config(name), *task_config(f"{name}_local"), spelling, "/files", *method("popo"))
    given = yaml.safe_load((REPOSITORY / "configs" / "task" / f"{name}_local.yaml").read_text())
    changed = local["data"]["task"]["init_args"]
    assert changed["folder"] == "/files"
    for slot in ("train", "benchmarks"):
        # Exactly: no split, configuration or column of the hub's source may remain.
        assert changed[slot] == given["data"]["task"]["init_args"][slot]
        hub["data"]["task"]["init_args"][slot] = changed[slot]
    hub["data"]["task"]["init_args"]["folder"] = "/files"
    assert local == hub


EXPECTED = {  # problems to train on, then each benchmark
    "math": (29149, {"aime24": 15, "aime25": 15, "amc23": 20, "math500": 250, "minerva": 136, "olympiadbench": 338}),
    "gsm8k": (7473, {"gsm8k": 660}),
    "countdown": (1998, {"countdown34": 256, "sos4": 256}),
    "countdown4": (10737, {"countdown34": 256, "sos4": 256}),
    "geometry": (400, {"geometry3k_val": 149, "geometry3k_test": 298}),
}


@needs_real
@pytest.mark.parametrize("name", [pytest.param("math", marks=pytest.mark.slow), *TASKS[1:]])
def test_local_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(
        capsys, *task_config(name), *task_config(f"{name}_local"), "--data.task.folder", str(REAL), *method("popo")
    )
    task = built(config)
    found = len(task.train_problems()), {bench: len(them) for bench, them in task.benchmarks().items()}
    assert found == EXPECTED[name]
    assert len(task.bad_rows()) == (2 if name == "math" else 0)
    if name == "countdown":
        lines = (REAL / "planning/countdown34_train.jsonl").read_text("utf-8").splitlines()
        assert max(json.loads(line)["row"] for line in lines) > 2000
        assert all(int(problem.id.removeprefix("cd34-")) < 2000 for problem in task.train_problems())


# -- the hub configurations, on small data sets laid out like the hub's -----------------------------------------------

HUB: dict[str, dict[str, list[dict[str, Any]]]] = {  # data set: "configuration/split": rows with the hub's columns
    "agentica-org/DeepScaleR-Preview-Dataset": {
        "default/train": [{"problem": r"Find $\frac{1}{1}$.", "answer": "1", "solution": r"\boxed{1}"}]
    },
    "HuggingFaceH4/aime_2024": {"default/train": [{"id": 60, "problem": "aime24", "answer": "204"}]},
    "math-ai/aime25": {"default/test": [{"problem": "aime25", "answer": "70", "id": "0"}]},
    "math-ai/amc23": {"default/test": [{"id": 0, "question": "amc23", "answer": "27.0"}]},
    "HuggingFaceH4/MATH-500": {
        "default/test": [
            {"problem": "m", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "test/a/1.json"}
        ]
    },
    "math-ai/minervamath": {"default/test": [{"question": "minerva", "answer": "9.6"}]},
    "Hothan/OlympiadBench": {
        "OE_MM_maths_en_COMP/train": [{"question": "with a picture", "final_answer": ["0"], "subfield": "Geometry"}],
        "OE_TO_maths_en_COMP/train": [{"question": "olympiad", "final_answer": ["$2$"], "subfield": "Algebra"}],
    },
    "openai/gsm8k": {
        "main/train": [{"question": "sum", "answer": "It is <<1+1=2>>2.\n#### 1,002"}],
        "main/test": [{"question": "held out", "answer": "#### 3"}],
        "socratic/train": [{"question": "other", "answer": "#### 4"}],
    },
    "Jiayi-Pan/Countdown-Tasks-3to4": {
        "default/train": [{"target": 98, "nums": [44, 19, n % 90 + 1]} for n in range(2600)]
    },
    "Jiayi-Pan/Countdown-Tasks-4": {"default/train": [{"target": 98, "nums": [4, 5, 6, n % 90]} for n in range(2600)]},
    "hiyouga/geometry3k": {
        f"default/{split}": [{"problem": f"<image>Find {split}.", "answer": "3", "images": [{"bytes": png(n + 5)}]}]
        for n, split in enumerate(("train", "validation", "test"))
    },
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes folders that are named and laid out like the hub's data sets. The datasets library reads both alike."""
    import datasets

    folder = tmp_path_factory.mktemp("hub")
    for name, tables in HUB.items():
        configs: dict[str, list[dict[str, str]]] = {}
        for table, rows in tables.items():
            config, split = table.split("/")
            data = datasets.Dataset.from_list(rows)
            if "images" in rows[0]:
                data = data.cast_column("images", datasets.List(datasets.Image()))
            (folder / name / config).mkdir(parents=True, exist_ok=True)
            data.to_parquet(folder / name / config / f"{split}.parquet")
            configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.parquet"})
        card = {"configs": [{"config_name": config, "data_files": files} for config, files in configs.items()]}
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return folder


def hub_task(name: str, hub: Path, capsys: pytest.CaptureFixture[str]) -> DatasetTask:
    return built(printed(capsys, *task_config(name), *method("popo")), folder=str(hub))


def question(problem: Any) -> str:
    (asked,) = [message["content"] for message in problem.prompt if message["role"] == "user"]
    return str(asked)


@pytest.mark.slow
def test_math_on_hub_columns(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = hub_task("math", hub, capsys)
    (train,) = task.train_problems()
    end = "\n\nLet's think step by step and output the final answer within \\boxed{}."
    assert (question(train), train.answer) == (r"Find $\frac{1}{1}$." + end, "1")
    held_out = {bench: [(p.id, p.answer, p.info) for p in them] for bench, them in task.benchmarks().items()}
    assert held_out == {
        "aime24": [("aime24/60", "204", {})],
        "aime25": [("aime25/0", "70", {})],
        "amc23": [("amc23/0", "27.0", {})],
        "math500": [("math500/test/a/1.json", r"\frac{1}{2}", {"level": 2, "subject": "Algebra"})],
        "minerva": [("minerva/1", "9.6", {})],
        "olympiadbench": [("olympiadbench/1", "$2$", {"subject": "Algebra"})],
    }
    assert not task.bad_rows()
    assert task.verify("27.0", r"so \boxed{27}")["acc"] == 1 and task.verify("$2$", r"\boxed{2}")["acc"] == 1


def test_gsm8k_on_hub_columns(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = hub_task("gsm8k", hub, capsys)
    assert [problem.answer for problem in task.train_problems()] == ["1002"]
    assert [problem.answer for problem in task.benchmarks()["gsm8k"]] == ["3"]


@pytest.mark.parametrize("name", ["countdown", "countdown4"])
def test_countdown_on_hub_columns(name: str, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = hub_task(name, hub, capsys)
    train, held_out = task.train_problems(), task.benchmarks()
    assert (len(train), {bench: len(them) for bench, them in held_out.items()}) == (
        2000,
        {"countdown34": 512, "countdown4": 512},
    )
    first = held_out["countdown34"][0]
    assert (first.id, first.answer) == ("countdown34/2001", {"numbers": [44, 19, 2000 % 90 + 1], "target": 98})
    assert "Using the numbers [44, 19, 21], create an equation that equals 98." in question(first)
    assert first.response_prefix == "Let me solve this step by step.\n<think>"
    assert task.verify(train[0].answer, "<answer>1</answer>") == {"score": 0.1, "acc": 0.0, "format": 1.0}
    assert len(train[0].answer["numbers"]) == (3 if name == "countdown" else 4)


def test_geometry_on_hub_columns(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = hub_task("geometry", hub, capsys)
    found = {"train": task.train_problems(), **task.benchmarks()}
    for n, (split, (problem,)) in enumerate(zip(("train", "validation", "test"), found.values(), strict=True)):
        assert question(problem).startswith(f"<image>Find {split}. You FIRST think")
        assert question(problem).endswith(r"The final answer MUST BE put in \boxed{}.")
        assert problem.images == (png(n + 5),)


def test_another_source_on_the_command_line(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests the command in math.yaml's comment, word for word, and a change of one benchmark."""
    text = (REPOSITORY / "configs" / "task" / "math.yaml").read_text().replace("\n#", "\n")
    value = text.split("--data.task.train '")[1].split("'")[0]
    config = printed(
        capsys, *task_config("math"), *method("popo"), "--data.task.train", value,
        "--data.task.benchmarks.aime24", "{path: other.jsonl}",
    )  # fmt: skip
    settings = config["data"]["task"]["init_args"]
    assert settings["train"] == yaml.safe_load(value) and settings["train"][0]["answer_boxed"] is True
    assert settings["benchmarks"]["aime24"] == {"path": "other.jsonl"} and len(settings["benchmarks"]) == 6


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("[{pth: a.jsonl}]", ["train", "path"]),
        ("[{path: a.jsonl, colums: {prompt: q}}]", ["train", "colums"]),
        ("[{path: a.jsonl, columns: {promt: q}}]", ["train", "promt"]),
        ("[{path: a.jsonl, limit: many}]", ["train", "many"]),
    ],
)
def test_misspelled_sources(source: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        popo("fit", *task_config("math"), *method("popo"), "--data.task.train", source)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err
    for word in words:
        assert word in sentence
