"""Runs as users make them, on one rank and split over two, exported and loaded by plain transformers and plain vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import (
    PLAIN,
    PLAIN_IMAGES,
    SECONDS,
    VLLM,
    answers_by,
    exported,
    greedy_rows,
    newest,
    policy_weights,
    popo_ran,
    python,
    question_of,
    said_by,
    same_bits,
    tensors,
)
from helpers.nodes import fsdp2, one_node
from helpers.tiny_models import REPOSITORY, method
from torch import Tensor

from popo_lightning.cli.export.weights import tensors_of
from popo_lightning.model.loading import load_model
from popo_lightning.policy import PolicyModule
from popo_lightning.toys.drawn_geometry import DrawnGeometry

LIMIT = 28
FOLDER = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
SMOLLM2 = [REPOSITORY / "configs" / name for name in ("task/arithmetic.yaml", "model/smollm2.yaml")]
needs_model = pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason=f"no {FOLDER}: run python scripts/get_smollm2.py"
)
VLLM_IMAGES = """
import json, sys
from PIL import Image
from transformers import AutoProcessor
from vllm import LLM, SamplingParams
folder, limit, pictures = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
processor = AutoProcessor.from_pretrained(folder)
options = {"enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**28}
llm = LLM(folder, dtype="float32", limit_mm_per_prompt={"image": 1, "video": 0}, **options)
asked = []
for question, picture in pictures:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked.append({"prompt": text, "multi_modal_data": {"image": Image.open(picture).convert("RGB")}})
found = llm.generate(asked, SamplingParams(temperature=0, max_tokens=limit))
assert not any(name.startswith("popo_lightning") for name in sys.modules)
print("ANSWERS " + json.dumps([each.outputs[0].text for each in found]))
"""


def made(task: str, ranks: int, folder: Path) -> Path:
    """Makes a run of three iterations. On two ranks its checkpoint is a folder of shards."""
    files = ["--config", str(REPOSITORY / "configs" / "task" / f"{task}.yaml"), *method("popo")]
    command = ["fit", *files, "--run.folder", str(folder), "--trainer.max_epochs", "3"]
    command += ["--trainer.accelerator", "cpu", "--evaluation.samples", "0", "--evaluation.limit", "21"]
    command += ["--data.task.held_out_problems", "21"]
    command += ["--evaluation.at_start", "false", "--data.max_new_tokens", str(LIMIT)]
    if ranks == 1:
        popo_ran(*command)
    else:
        command += ["--data.engine", "popo_lightning.engines.transformers.TransformersEngine"]
        one_node(ranks, *command, *fsdp2(ranks, whole_checkpoints=False), seconds=SECONDS)
    return folder


def kept_weights(checkpoint: Path) -> dict[str, Tensor]:
    if checkpoint.is_dir():
        return tensors_of(checkpoint, "state_dict.model.")
    return policy_weights(checkpoint)


def assert_moved(checkpoint: Path, kept: dict[str, Tensor]) -> None:
    """Checks that training changed the policy. Otherwise the first policy's answers would be right too."""
    module = PolicyModule.load_from_checkpoint(checkpoint)
    began = load_model(module.folder, torch.float32)
    assert any(not torch.equal(kept[name], parameter) for name, parameter in began.named_parameters())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [1, 2])
def test_countdown_tiny(tmp_path: Path, ranks: int) -> None:
    run = made("countdown_tiny", ranks, tmp_path / "run")
    assert newest(run).is_dir() == (ranks == 2)
    out = tmp_path / "out"
    exported(run, out)
    kept = kept_weights(newest(run))
    assert_moved(newest(run), kept)
    found = tensors(out)
    assert found.keys() == kept.keys() - {"lm_head.weight"}
    assert all(same_bits(tensor, kept[name]) for name, tensor in found.items())
    rows = greedy_rows(run)
    prompts, answers = [row["prompt"] for row in rows], [row["response"] for row in rows]
    assert len(answers) == 21 and len(set(answers)) > 3
    assert answers_by(PLAIN + VLLM, out, LIMIT, prompts, tmp_path) == [answers, answers]
    code, said, err = said_by("sample", run, prompts[0], "--temperature", "0", "--engine", "vllm")
    assert code == 0 and answers[0] in said.splitlines(), err


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.nightly)])
def test_geometry_tiny(tmp_path: Path, ranks: int) -> None:
    from transformers import AutoModelForImageTextToText

    run = made("geometry_tiny", ranks, tmp_path / "run")
    out = tmp_path / "out"
    exported(run, out)
    kept = kept_weights(newest(run))
    assert_moved(newest(run), kept)
    for name, parameter in AutoModelForImageTextToText.from_pretrained(out, dtype="auto").named_parameters():
        assert same_bits(parameter.detach(), kept.pop(name)), name
    assert kept.keys() <= {"lm_head.weight"}
    problems = {problem.id: problem for problem in DrawnGeometry().benchmarks()["geometry"]}
    asked: list[Any] = []
    answers = []
    for number, row in enumerate(greedy_rows(run)):
        file = tmp_path / f"{number}.png"
        file.write_bytes(problems[row["problem"]].images[0])  # type: ignore[arg-type]
        asked.append((question_of(problems[row["problem"]]), str(file)))
        answers.append(row["response"])
    assert len(answers) == 21 and len(set(answers)) > 3
    assert answers_by(PLAIN_IMAGES + VLLM_IMAGES, out, LIMIT, asked, tmp_path) == [answers, answers]
    for engine in ("transformers", "vllm"):
        more = ["--image", asked[0][1], "--temperature", "0", "--engine", engine]
        code, said, err = said_by("sample", run, asked[0][0], *more)
        assert code == 0 and answers[0] in said.splitlines(), err


@pytest.mark.slow
@pytest.mark.vllm
@needs_model
def test_smollm2(tmp_path: Path) -> None:
    """Exports a pretrained model from a folder, also in bfloat16, and asks it in chat messages."""
    files = [part for file in SMOLLM2 for part in ("--config", str(file))]
    command = ["fit", *files, *method("grpo"), "--model.path", str(FOLDER), "--run.folder", str(tmp_path / "run")]
    command += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--data.problems_per_iteration", "4"]
    command += ["--data.group_size", "4", "--data.minibatches", "1", "--evaluation.samples", "0"]
    command += ["--evaluation.limit", "6", "--evaluation.at_start", "false", "--data.max_new_tokens", "16"]
    command += ["--model.optimizer.init_args.lr", "1e-4"]
    popo_ran(*command)
    run, out = tmp_path / "run", tmp_path / "out"
    exported(run, out)
    kept = policy_weights(newest(run))
    assert all(same_bits(tensor, kept[name]) for name, tensor in tensors(out).items())
    rows = greedy_rows(run)
    prompts, answers = [row["prompt"] for row in rows], [row["response"] for row in rows]
    assert answers_by(PLAIN + VLLM, out, 16, prompts, tmp_path) == [answers, answers]
    exported(run, tmp_path / "half", "--dtype", "bfloat16")
    halves = tensors(tmp_path / "half")
    assert all(same_bits(tensor, kept[name].bfloat16()) for name, tensor in halves.items())
    question = prompts[0][-1]["content"]
    code, said, err = said_by("sample", run, question, "--temperature", "0", "--gold", str(rows[0]["answer"]))
    assert code == 0 and f"acc {rows[0]['acc']:g}" in said and answers[0].splitlines()[0] in said, err


@pytest.mark.slow
def test_memory_of_an_export(tmp_path: Path) -> None:
    """From a checkpoint file, at most the weights of one output file are in the process's own memory.

    Shards are all loaded.
    """
    output = python(MEMORY, tmp_path)
    of_file, of_shards, weights = map(int, output.split()[-3:])
    assert weights > 150 * 2**20
    assert of_file < 0.6 * weights and of_shards < 1.6 * weights, (of_file / weights, of_shards / weights)


MEMORY = """
import json, re, shutil, sys, threading, time, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from popo_lightning.cli.export.exported_folder import export
from popo_lightning.toys.countdown_policy import SYMBOLS, symbol_tokenizer
from helpers.exports import as_shards
folder = Path(sys.argv[1])
config = LlamaConfig(vocab_size=len(SYMBOLS), hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, eos_token_id=1)
model = LlamaForCausalLM(config)
config.save_pretrained(folder / "base")
symbol_tokenizer(SYMBOLS).save_pretrained(folder / "base")
state = {"pytorch-lightning_version": "2", "optimizer_states": []}
state["state_dict"] = {f"model.{name}": weight for name, weight in model.state_dict().items()}
weights = sum(weight.nbytes for weight in model.state_dict().values())
torch.save(state, folder / "a.ckpt")
del model, state
shards = as_shards(folder / "a.ckpt", folder / "shards.ckpt")

def own():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def most(source, out):
    import gc, ctypes
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, done = own(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], own())
    thread = threading.Thread(target=watch)
    thread.start()
    export(str(source), out, "popo export", base=str(folder / "base"), shard_bytes=20_000_000)
    done.set()
    thread.join()
    return peak[0] - before

most(folder / "a.ckpt", folder / "warm up")  # what is imported stays
print(most(folder / "a.ckpt", folder / "one"), most(shards, folder / "two"), weights)
"""
