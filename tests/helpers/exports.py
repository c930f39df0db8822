"""Checkpoints to export, and the answers of a run's last evaluation."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import save as save_shards

from helpers.forked import run_forked
from helpers.tiny_models import environment
from popo_lightning.cli.estimate.command import main as estimate_main
from popo_lightning.cli.export.export_command import main as export_main
from popo_lightning.cli.export.sample_command import main as sample_main
from popo_lightning.core.problems import Problem


def newest(run: Path) -> Path:
    """Returns the checkpoint of a run that keeps only one."""
    (found,) = (run / "checkpoints").glob("*.ckpt")
    return found


def state_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return found


def as_shards(checkpoint: Path, folder: Path) -> Path:
    """Writes a checkpoint file as the folder that FSDP2 would write."""
    state = state_of(checkpoint)
    save_shards({"state_dict": state.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    state.pop("optimizer_states")
    torch.save(state, folder / "meta.pt")
    return folder


def flipped(file: Path, beside: bytes) -> None:
    """Flips one bit in the middle of the given bytes of a file."""
    content = bytearray(file.read_bytes())
    place = content.index(beside)
    content[place + len(beside) // 2] ^= 1
    file.write_bytes(content)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of all files of an exported folder, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def policy_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint file by parameter name."""
    named = state_of(checkpoint)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in named.items() if name.startswith("model.")}


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def greedy_rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of greedy answers in the run's last evaluation, from all ranks."""
    last = sorted((run / "evaluations").glob("iteration-*"))[-1]
    rows = [json.loads(line) for file in sorted(last.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [row for row in rows if row["greedy"]]


def said_by(command: str, *args: str | Path) -> tuple[int, str, str]:
    """Runs a command in this process. Returns its exit code, output and errors."""
    main = {"export": export_main, "sample": sample_main, "estimate": estimate_main}[command]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def popo_ran(*args: str | Path) -> None:
    """Runs popo as a separate process, which must succeed."""
    done = run_forked(["-m", "popo_lightning", *args], environment(), timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]


def exported(*args: str | Path) -> str:
    """Runs `popo export`, which must succeed, and returns its messages."""
    code, _, err = said_by("export", *args)
    assert code == 0, err
    return err


def refused(command: str, *args: str | Path) -> str:
    """Runs a command that is refused, and returns its sentence."""
    code, out, err = said_by(command, *args)
    assert (code, out, len(err.splitlines())) == (2, "", 1), (code, out, err)
    return err


SECONDS = 1200  # time limit of a process on a busy machine

# vLLM on a busy machine: in one process, without pinning cores.
MODEST = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def python(script: str, *args: str | Path) -> str:
    """Runs a script in a separate process, which has not imported this package, and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=environment() | MODEST,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, limit = sys.argv[1], int(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
found = []
for prompt in json.load(sys.stdin if len(sys.argv) < 4 else open(sys.argv[3])):
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=isinstance(prompt, str))["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=limit)[0, ids.shape[1]:]
    found.append(tokenizer.decode(answer, skip_special_tokens=True))
assert not any(name.startswith("popo_lightning") for name in sys.modules)
print("ANSWERS " + json.dumps(found))
"""

PLAIN_IMAGES = """
import io, json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, limit, pictures = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
processor = AutoProcessor.from_pretrained(folder)
found = []
for question, picture in pictures:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].shape[1]:]
    found.append(processor.tokenizer.decode(answer, skip_special_tokens=True))
assert not any(name.startswith("popo_lightning") for name in sys.modules)
print("ANSWERS " + json.dumps(found))
"""

VLLM = """
import json, sys
from vllm import LLM, SamplingParams
folder, limit, prompts = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=2**28)
drawn = SamplingParams(temperature=0, max_tokens=limit)
if isinstance(prompts[0], str):
    found = llm.generate(prompts, drawn)
else:
    found = llm.chat(prompts, drawn)
assert not any(name.startswith("popo_lightning") for name in sys.modules)
print("ANSWERS " + json.dumps([each.outputs[0].text for each in found]))
"""


def answers_by(libraries: str, folder: Path, limit: int, prompts: list[Any], scratch: Path) -> list[list[str]]:
    """Returns each library's greedy answers. The scripts follow each other in one process, without this package."""
    file = scratch / "prompts.json"
    file.write_text(json.dumps(prompts))
    lines = python(libraries, folder, str(limit), file).splitlines()
    return [json.loads(line.removeprefix("ANSWERS ")) for line in lines if line.startswith("ANSWERS ")]


def question_of(problem: Problem) -> str:
    """Returns the question that is asked about a picture."""
    return str(problem.prompt[0]["content"]).removeprefix("<image>")  # type: ignore[index]
