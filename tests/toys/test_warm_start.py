"""The tiny policy: its training examples, its tokenizer, and its place on disk."""

from __future__ import annotations

import inspect
import json
import random
import shutil
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from popo_lightning.core.cache import cache_folder
from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.toys import countdown_policy as warm_start
from popo_lightning.toys.countdown import CountdownSteps, verify_steps
from popo_lightning.toys.countdown_policy import IGNORED, SYMBOLS, CountdownWarmStart, random_steps

TINY: dict[str, Any] = {
    "examples": 640,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "hidden_size": 32,
    "layers": 1,
    "heads": 1,
    "intermediate_size": 32,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return CountdownWarmStart(**TINY).folder()


# -- cache ---------------------------------------------------------------------------------------------------------


class Note(WarmStart):
    """Builds a text file."""

    name = "note"

    def __init__(self, text: str, fails_with: BaseException | None = None) -> None:
        self.text = text
        self.fails_with = fails_with
        self.built = 0

    def recipe(self) -> dict[str, object]:
        return {"text": self.text}

    def build(self, folder: Path) -> None:
        assert folder.is_dir() and not list(folder.iterdir())
        self.built += 1
        (folder / f"half {self.built}").write_text("half")
        if self.fails_with is not None:
            raise self.fails_with
        (folder / "note").write_text(self.text)


def test_built_once_and_found_again(cache: Path) -> None:
    note, again, other = Note("a"), Note("a"), Note("b")
    assert note.folder() == note.folder() == again.folder() != other.folder()
    assert (note.built, again.built, other.built) == (1, 0, 1)
    assert note.folder().parent == cache and note.folder().name.startswith("note-")
    assert (other.folder() / "note").read_text() == "b"


@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_interrupted_build_leaves_nothing_usable(cache: Path, failure: BaseException) -> None:
    note = Note("a", failure)
    with pytest.raises(type(failure)):
        note.folder()
    assert not [path for path in cache.iterdir() if path.is_dir() and not path.name.endswith(".draft")]
    note.fails_with = None
    assert sorted(path.name for path in note.folder().iterdir()) == ["half 2", "note"]  # none from the first attempt
    assert not list(cache.glob("*.draft"))


def test_address_follows_every_setting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountdownWarmStart, "build", lambda self, folder: None)
    defaults = {n: p.default for n, p in inspect.signature(CountdownWarmStart).parameters.items()}
    changed = {n: value * 2 or 1 for n, value in defaults.items()} | {"operations": "+-", "device": "cuda"}
    names = {CountdownWarmStart(**defaults | {n: value}).folder().name for n, value in changed.items()}
    names.add(CountdownWarmStart().folder().name)
    assert len(names) == len(defaults) + 1
    assert CountdownWarmStart(**defaults).folder().name in names
    monkeypatch.setattr(warm_start, "RECIPE", 10**6)
    assert CountdownWarmStart().folder().name not in names


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "popo_lightning"


def test_address_of_the_cpu_is_as_before_there_was_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device" not in CountdownWarmStart().recipe()
    assert CountdownWarmStart(device="cuda").recipe()["device"] == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_sentence(cache: Path) -> None:
    with pytest.raises(SettingError, match=r"model.warm_start.device is 'cuda'.*use cpu"):
        CountdownWarmStart(**TINY, device="cuda").folder()


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operations", ["+-*", "+-*/", "-"])
def test_random_steps_are_well_formed(operations: str) -> None:
    draw = random.Random(1)
    used: Counter[str] = Counter()
    for _ in range(400):
        numbers = [draw.randint(1, 9) for _ in range(draw.randint(2, 5))]
        text = random_steps(numbers, operations, draw)
        assert verify_steps({"numbers": numbers, "target": -1}, text)["format"] == 1, (numbers, text)
        used.update(c for c in text if c in "+-*/")
    assert set(used) == set(operations)


def examples(count: int, **settings: Any) -> list[tuple[tuple[int, ...], int, str]]:
    """Returns (numbers in the prompt's order, target, answer)."""
    found = []
    for prompt, answer in islice(CountdownWarmStart(**settings)._examples(), count):
        numbers, target = prompt.removesuffix(":").split(">")
        found.append((tuple(map(int, numbers.split(","))), int(target), answer))
    return found


@pytest.mark.parametrize("numbers", [2, 3])
def test_examples_never_show_a_held_out_problem(numbers: int) -> None:
    both: dict[str, Any] = {"numbers": numbers, "largest_number": 7, "held_out_share": 0.3}
    train = CountdownSteps(**both, held_out_problems=1, min_ways=1).train_problems()
    allowed = {(tuple(p.answer["numbers"]), p.answer["target"]) for p in train}
    shown = examples(5000, **both)
    asked = {(tuple(sorted(order)), target) for order, target, _ in shown}
    assert asked <= allowed and len(asked) > 0.9 * len(allowed)
    orders = {order for order, _, _ in shown if sorted(order) == list(range(2, numbers + 2))}
    assert orders == set(permutations(range(2, numbers + 2)))


def test_default_examples_never_show_a_problem_of_the_default_benchmark() -> None:
    held_out = {(tuple(p.answer["numbers"]), p.answer["target"]) for p in CountdownSteps().benchmarks()["countdown"]}
    assert not held_out & {(tuple(sorted(order)), target) for order, target, _ in examples(5000)}


def share_right(right: float) -> float:
    shown = examples(1500, largest_number=9, right=right)
    verdicts = [verify_steps({"numbers": order, "target": target}, text) for order, target, text in shown]
    assert all(verdict["format"] == 1 for verdict in verdicts)
    return sum(verdict["score"] for verdict in verdicts) / len(verdicts)


def test_share_of_right_examples() -> None:
    by_chance = share_right(0.0)  # random steps are sometimes right
    assert by_chance < 0.15
    assert share_right(0.4) == pytest.approx(0.4 + 0.6 * by_chance, abs=0.05)
    assert share_right(1.0) == 1


def test_examples_follow_the_seed() -> None:
    assert examples(20) == examples(20) != examples(20, seed=1)


def test_labels_are_the_answer_and_its_end() -> None:
    end = SYMBOLS.index("<eos>")

    def ids(text: str) -> list[int]:
        return [SYMBOLS.index(c) for c in text]

    input_ids, labels = warm_start._encode([("2,3>5:", "2+3=5"), ("1,1>2:", "1")])
    assert input_ids.tolist() == [[*ids("2,3>5:2+3=5"), end], [*ids("1,1>2:1"), end, 0, 0, 0, 0]]
    assert labels.tolist() == [[IGNORED] * 6 + [*ids("2+3=5"), end], [IGNORED] * 6 + [*ids("1"), end] + [IGNORED] * 4]


# -- the policy ----------------------------------------------------------------------------------------------------


def test_build_is_deterministic_and_leaves_random_state_alone(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPO_CACHE", str(tmp_path))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = CountdownWarmStart(**TINY).folder()
    assert torch.equal(torch.get_rng_state(), state)
    assert again != built and again.name == built.name
    left, right = load_file(built / "model.safetensors"), load_file(again / "model.safetensors")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    other = load_file(CountdownWarmStart(**TINY, seed=1).folder() / "model.safetensors")
    assert not torch.equal(left["model.norm.weight"], other["model.norm.weight"])


def test_training_teaches_the_form(built: Path) -> None:
    from transformers import AutoModelForCausalLM

    input_ids, labels = warm_start._encode(list(islice(CountdownWarmStart(seed=9)._examples(), 64)))
    model = AutoModelForCausalLM.from_pretrained(built)
    with torch.no_grad():
        loss = float(model(input_ids=input_ids, labels=labels).loss)
    assert loss < 2.6  # a guess costs log 23 = 3.14
    config = json.loads((built / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (32, 1, len(SYMBOLS))
    assert config["eos_token_id"] == SYMBOLS.index("<eos>") and config["pad_token_id"] == 0


def test_examples_of_several_counts() -> None:
    """There are equally many of each count. All are true, and the right share is as requested."""
    warm = CountdownWarmStart(numbers=[2, 3], largest_number=6, right=0.5)
    held_out = CountdownSteps([2, 3], 6, held_out_problems=1, min_ways=1, orders=1)
    train = {p.id for count in (2, 3) for p in warm._problems_of(count)}
    assert {p.id for p in held_out.train_problems()} <= {f"{p}" for p in train}
    counts, right = Counter[int](), 0
    for prompt, answer in islice(warm._examples(), 2000):
        numbers = [int(n) for n in prompt.split(">")[0].split(",")]
        target = int(prompt.split(">")[1].rstrip(":"))
        parts = verify_steps({"numbers": numbers, "target": target}, answer)
        assert parts["format"] == 1
        counts[len(numbers)] += 1
        right += parts["acc"] == 1
    assert abs(counts[2] - 1000) < 100
    assert 0.45 < right / 2000 < 0.65


def test_tokenizer_is_one_token_a_character_and_back(built: Path) -> None:
    encoder = PromptEncoder(built, 100)
    for prompt, answer in islice(CountdownWarmStart(operations="+-*/")._examples(), 200):
        ids = encoder.encode(Problem(prompt + answer, prompt + answer, None)).ids
        assert len(ids) == len(prompt + answer) and ids.dtype == torch.long
        assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + answer
        assert torch.equal(ids, warm_start._encode([(prompt, answer)])[0][0, :-1])  # the policy's training input
    assert encoder.tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == prompt + answer
    assert (encoder.tokenizer.eos_token_id, encoder.tokenizer.pad_token_id) == (1, 0)


def test_long_prompts_are_left_out_and_counted(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    problems = [Problem(str(n), "1" * n, None) for n in (3, 5, 4, 9)]
    assert [p.id for p in PromptEncoder(built, 4).fitting(problems)] == ["3", "4"]
    assert "2 of 4 prompts" in caplog.text


def test_unfit_tokenizers_are_refused(built: Path, tmp_path: Path) -> None:
    chat = Problem("chat", [{"role": "user", "content": "1"}], None)
    with pytest.raises(SettingError, match="no chat template"):
        PromptEncoder(built, 9).encode(chat)
    encoder = PromptEncoder(built, 9)
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}:{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert encoder.encode(chat).ids.tolist() == [SYMBOLS.index(c) for c in "1:>"]
    with pytest.raises(SettingError, match=r"a folder without config.json"):
        PromptEncoder(tmp_path, 9)
    encoder.tokenizer.eos_token = None
    shutil.copy(built / "config.json", tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="no eos token"):
        PromptEncoder(tmp_path, 9)
