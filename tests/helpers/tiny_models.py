"""Models and runs small enough for a test: a tiny trained Countdown policy, random models, and short real trainings."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from helpers.forked import run_forked
from helpers.places import REPOSITORY, TESTS
from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.core.task import Task
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.objectives.objective import Objective
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalPolicy
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import SYMBOLS, CountdownWarmStart, symbol_tokenizer

NUMBERS: dict[str, Any] = {"numbers": 2, "largest_number": 9, "operations": "+-*", "held_out_share": 0.3}
TASK: dict[str, Any] = {**NUMBERS, "held_out_problems": 12, "orders": 1, "min_ways": 1}
POLICY: dict[str, Any] = {
    **NUMBERS,
    "examples": 12000,
    "batch_size": 60,
    "learning_rate": 6e-3,
    "right": 0.45,
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 128,
}
RANDOM = ("llama-tied", "llama-untied", "qwen2")


def tiny_task() -> CountdownSteps:
    """Returns Countdown with two numbers: learned within seconds, but wrong often enough to make groups effective."""
    return CountdownSteps(**TASK)


def tiny_policy() -> CountdownWarmStart:
    return CountdownWarmStart(**POLICY)


def random_model(kind: str, folder: Path, tokenizer: Any = None) -> Path:
    """Makes an untrained model with peaked distributions, so that wrong log-probs differ much from right ones."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer or symbol_tokenizer(SYMBOLS)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": kind != "llama-untied",
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "qwen2":
            model: Any = Qwen2ForCausalLM(Qwen2Config(**settings))
        else:
            model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


IMAGE_SYMBOLS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGE_TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def byte_tokenizer() -> Any:
    """Makes a tokenizer that reads any text, one byte per token, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = IMAGE_TEMPLATE
    return made


def random_vision_model(folder: Path, tokenizer: Any = None) -> Path:
    """Makes an untrained Qwen2.5-VL with peaked distributions that depend on its images."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tokenizer or symbol_tokenizer(SYMBOLS)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_SYMBOLS})
    tokenizer.chat_template = IMAGE_TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(IMAGE_SYMBOLS)
    shared = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            **shared,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": 0.2,
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
        **shared,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=IMAGE_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def effective_share(folder: Path, problems: int = 48, group_size: int = 4) -> float:
    """Returns the share of groups with different rewards, at temperature 1."""
    task, encoder = tiny_task(), PromptEncoder(folder, 16)
    engine = TransformersEngine()
    engine.start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 32))
    asked = task.train_problems()[:problems]
    sampled = engine.generate([encoder.encode(p) for p in asked], group_size, Sampling(12), seed=0)
    scores = [{task.verify(p.answer, r.text)["score"] for r in rs} for p, rs in zip(asked, sampled, strict=True)]
    return sum(len(found) > 1 for found in scores) / len(scores)


# -- runs ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    trainer: L.Trainer
    module: PolicyModule
    data: RolloutDataModule
    folder: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        return metrics(self.folder)

    @property
    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.module)


class InFloat64(PolicyModule):
    """A policy in float64, whose matrix products round too little to look like a fault on any processor."""

    def _take(self, model: Any) -> None:
        super()._take(model.double())


def attached(module: PolicyModule, precision: str = "32-true") -> PolicyModule:
    """Loads a module's model in a trainer that does not train."""
    module.trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    module.configure_model()
    return module


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def metrics(folder: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv without empty cells, and without time and memory, which vary from run to run."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and not _is_measured(k)} for row in rows]


def _is_measured(column: str) -> bool:
    return column.startswith(("time/", "throughput/", "memory/")) or bool(re.fullmatch(r"eval/.*/seconds", column))


def slots(objective: Objective) -> dict[str, Any]:
    """Returns the parts of an objective as arguments of PolicyModule."""
    return vars(objective) | {"regularizers": list(objective.regularizers)}


def fit(
    policy: Path,
    folder: Path,
    *,
    objective: Objective | None = None,
    composer: Composer | None = None,
    engine: RolloutEngine | None = None,
    proximal: ProximalPolicy | None = None,
    callbacks: Sequence[L.Callback] = (),
    monitor: Monitor | None = None,
    iterations: int = 3,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    max_grad_norm: float | None = 1.0,
    micro_batch_tokens: int = 16384,
    max_prompt_tokens: int = 16,
    precision: str = "32-true",
    model: dict[str, Any] | None = None,
    **data: Any,
) -> Run:
    """Trains in this process, with the transformers engine and POPO unless told otherwise."""
    L.seed_everything(1, verbose=False)
    module = PolicyModule(
        path=str(policy),
        optimizer=lambda parameters: optimizer(parameters, lr=lr),
        max_grad_norm=max_grad_norm,
        micro_batch_tokens=micro_batch_tokens,
        **(slots(objective or Objective()) | (model or {})),
    )
    settings = {"problems_per_iteration": 10, "group_size": 4, "minibatches": 2, "max_new_tokens": 10} | data
    rollouts = RolloutDataModule(
        task=settings.pop("task", tiny_task()),
        engine=engine or TransformersEngine(),
        composer=composer or PrioritizedGroupReplay(GroupReplayBuffer(32)),
        max_prompt_tokens=max_prompt_tokens,
        **settings,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=iterations,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=[*filter(None, (monitor, proximal)), *callbacks],  # the module adds what is missing
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, rollouts)
    return Run(trainer, module, rollouts, folder)


def write_config(path: Path, **data: Any) -> Path:
    """Writes a task configuration as a user would, with six iterations of three minibatches."""
    content = {
        "run": {"task": "tiny"},
        "model": {
            "warm_start": {"class_path": "CountdownWarmStart", "init_args": POLICY},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.0}},
        },
        "data": {
            "task": {"class_path": "CountdownSteps", "init_args": TASK},
            "engine": {"class_path": "TransformersEngine"},
            "problems_per_iteration": 9,
            "group_size": 4,
            "minibatches": 3,
            "max_new_tokens": 10,
            "max_prompt_tokens": 16,
            **data,
        },
        "evaluation": {"every_n_iterations": 2, "samples": 2, "avg_k": 2, "pass_k": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 6},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def method(name: str) -> list[str]:
    return ["--config", str(REPOSITORY / "configs" / "method" / f"{name}.yaml")]


def popo(*args: str | Path) -> Any:
    """Runs the popo command in this process."""
    from popo_lightning.cli.main import run

    return run([str(arg) for arg in args])


def environment() -> dict[str, str]:
    """Returns an environment in which a process finds this repository and the test classes, and uses one thread."""
    path = os.pathsep.join([str(REPOSITORY), str(TESTS)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def popo_process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the popo command as a separate process."""
    return run_forked(["-m", "popo_lightning", *args], environment())


class KillAt(L.Callback):
    """Kills the process, without a chance to clean up, at the start of one minibatch."""

    def __init__(self, iteration: int, minibatch: int) -> None:
        self.place = iteration, minibatch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (batch.version + 1, batch.index) == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInEvaluation(L.Callback):
    """Kills the process, without a chance to clean up, in the evaluation at the end, before any of its results."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sample = data.sample

        def dies(*arguments: Any) -> Any:
            if data.iteration == self.iteration:
                os.kill(os.getpid(), signal.SIGKILL)
            return sample(*arguments)

        data.sample = dies


class KillRankAt(KillAt):
    """Kills one of the ranks at the start of the third iteration."""

    def __init__(self, rank: int) -> None:
        super().__init__(3, 0)
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class SignalAt(L.Callback):
    """Sends the process a signal at one of its own hooks. The run then continues as far as it can.

    Args:
        hook: Name of the hook.
        iteration: Counted from 1.
        minibatch: Index, for hooks that have a minibatch.
        number: Number of the signal; 0 raises an error instead.
        rank: Rank that gets the signal; None for all.
    """

    def __init__(self, hook: str, iteration: int, minibatch: int = 0, number: int = 2, rank: int | None = None) -> None:
        self.iteration, self.minibatch, self.number, self.rank = iteration, minibatch, number, rank
        setattr(self, hook, self._hook)

    def _hook(self, trainer: L.Trainer, pl_module: Any, *more: Any) -> None:
        batches = [each for each in more if hasattr(each, "version")]
        place = (batches[0].version + 1, batches[0].index) if batches else (trainer.datamodule.iteration, 0)  # type: ignore[attr-defined]
        if place == (self.iteration, self.minibatch) and self.rank in (None, trainer.global_rank):
            signalled(self.number)


class SignalWhileSampling(TransformersEngine):
    """Sends the process a signal in the middle of one call of the engine.

    Args:
        call: Number of the call in this process, counted from 1.
        number: Number of the signal; 0 raises an error instead.
    """

    def __init__(self, call: int, number: int = 2) -> None:
        super().__init__()
        self.left, self.number = call, number

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        for ready in super().stream(*args, **kwargs):
            if self.left == 0:
                signalled(self.number)
            yield ready


def signalled(number: int) -> None:
    if not number:
        raise RuntimeError("out of luck")
    os.kill(os.getpid(), number)


class NoProblems(Task):
    """A task with an empty data file."""

    verify = CountdownSteps.verify

    def train_problems(self) -> list[Any]:
        return []

    def benchmarks(self) -> dict[str, Sequence[Any]]:
        return {}


class EngineByProblem(TransformersEngine):
    """Samples the same responses to a problem, whatever other problems are asked and on whatever rank."""

    stream = RolloutEngine.stream  # calls generate

    def generate(self, prompts: Sequence[Any], n: int, sampling: Any, seed: int) -> list[Any]:
        return [super(EngineByProblem, self).generate([p], n, sampling, int(p.ids.sum()))[0] for p in prompts]
