"""The settings of a run that the plan needs, read as `popo fit` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from popo_lightning.cli.plan.kept_checkpoints import settings_of
from popo_lightning.cli.plan.optimizer_state import ADAM, OptimizerState, optimizer_state
from popo_lightning.core.did_you_mean import object_at
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.base import RolloutEngine
from popo_lightning.engines.servers.engine import ServerEngine
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.lora import Lora
from popo_lightning.model.sharding import check_precision, check_sharding, settle_strategy
from popo_lightning.policy import PolicyModule
from popo_lightning.rollout.checks import check_share

WHOLE, DDP, FSDP = "whole", "ddp", "fsdp"  # how the weights are distributed over the ranks
VLLM, TRANSFORMERS, SERVERS, OTHER = "vllm", "transformers", "servers", "other"


@dataclass(frozen=True)
class Engine:
    """What an engine takes of the memory on the trainer's card.

    Args:
        kind: VLLM, TRANSFORMERS, SERVERS or OTHER.
        share: Fraction of the card's memory that vLLM takes.
        sleep_level: 0 keeps everything while the trainer works, 1 and 2 free weights and cache.
        cpu_cache: Bytes of vLLM's cache on a CPU.
        batch_size: Responses that the transformers engine generates in parallel.
        max_num_seqs: Maximum number of responses that vLLM decodes at once, if it is set.
    """

    kind: str
    share: float = 0.6
    sleep_level: int = 0
    cpu_cache: int = 0
    batch_size: int = 0
    max_num_seqs: int | None = None


@dataclass(frozen=True)
class RunSettings:
    """Settings that decide what memory and disk space a run needs. Batches are over all ranks."""

    on_gpu: bool = True
    card_name: str = ""  # if known
    ranks: int = 1
    layout: str = WHOLE  # or DDP or FSDP
    bucket_view: bool = False  # DDP's buckets are the gradients
    weight_dtype: torch.dtype = torch.float32
    autocast: bool = False  # computes in bfloat16 from float32 weights
    optimizer: OptimizerState = ADAM
    has_critic: bool = False
    critic_outputs: int = 1  # per state
    critic_copies: int = 0  # copies of what it trains: a target, and the target's last move
    has_reference: bool = False
    lora: Lora | None = None
    freeze_vision: bool = False
    gradients_held_whole: bool = False  # under FSDP, until the last micro-batch
    entropy_gradient: bool = False
    micro_batch_tokens: int = 16384
    gradient_checkpointing: bool = False
    problems: int = 32
    group_size: int = 8
    minibatches: int = 2
    ppo_epochs: int = 1
    prompt_tokens: int = 1024
    response_tokens: int = 1024
    evaluation_tokens: int = 0  # response tokens of the longest evaluation
    image_pixels: int | None = None  # maximum pixels per image
    engine: Engine = Engine(SERVERS)
    iterations: int = 100  # 0: without end
    checkpoint_every: int | None = 20  # iterations; the end is always saved
    checkpoint_every_steps: int | None = None  # or minibatches
    checkpoints_kept: int = 1  # -1: all
    checkpoint_last_beside: bool = False  # whether last.ckpt is kept besides, in a file of its own
    checkpoint_has_optimizer: bool = True
    notes: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.ranks if self.layout == FSDP else 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the matrix multiplications in policy and engine."""
        return torch.bfloat16 if self.autocast else self.weight_dtype

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter; adapters are float32 beside weights of any dtype."""
        return self.weight_dtype.itemsize if self.lora is None else 4

    @property
    def sequence_tokens(self) -> int:
        """Maximum tokens of prompt and response in training."""
        return self.prompt_tokens + self.response_tokens

    @property
    def engine_tokens(self) -> int:
        """Maximum tokens of prompt and response that the engine makes room for."""
        return self.prompt_tokens + max(self.response_tokens, self.evaluation_tokens)

    @property
    def rank_sequences(self) -> int:
        """Responses that a rank samples in an iteration."""
        return self.problems * self.group_size // self.ranks

    @property
    def pass_tokens(self) -> int:
        """Maximum padded tokens of one forward pass. A longer row gets its own pass; no minibatch has more tokens."""
        groups = -(-self.problems // (self.ranks * self.minibatches))
        minibatch = groups * self.group_size * self.sequence_tokens
        return min(max(self.micro_batch_tokens, self.sequence_tokens), minibatch)


def read_settings(config: Any, policy: PolicyModule, data: RolloutDataModule, for_card: bool) -> RunSettings:
    """Reads the settings of a run.

    Args:
        config: Settings of `popo fit`, for the trainer, the evaluation and the checkpoints.
        policy: Policy that its settings make; no model is loaded.
        data: Data module that its settings make.
        for_card: Whether a card's size is given.

    Raises:
        SettingError: `popo fit` would refuse the settings too, or the plan does not know them.
    """
    notes: list[str] = []
    trainer = config.trainer
    on_gpu = _on_gpu(str(trainer.accelerator), for_card)
    devices = count_devices(trainer.devices, on_gpu, notes)
    ranks = devices * trainer.num_nodes
    strategy = _strategy(trainer.strategy, ranks)
    settle_strategy(strategy, ranks)
    check_sharding(strategy, ranks)
    check_share(data, ranks)
    layout = _layout(strategy)
    autocast = check_precision(trainer.precision) == "bf16-mixed" and policy.weight_dtype == torch.float32
    trained = policy.weight_dtype if policy.lora is None else torch.float32
    optimizer = optimizer_state(policy.make_optimizer, trained, on_gpu)
    return RunSettings(
        on_gpu=on_gpu,
        ranks=ranks,
        layout=layout,
        bucket_view=bool(getattr(strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view")),
        weight_dtype=policy.weight_dtype,
        autocast=autocast,
        optimizer=optimizer,
        has_critic=policy.critic is not None,
        critic_outputs=policy.critic.outputs if policy.critic is not None else 1,
        critic_copies=policy.critic.copies if policy.critic is not None else 0,
        has_reference=_has_reference(policy, data),
        lora=policy.lora,
        freeze_vision=policy.freeze_vision,
        gradients_held_whole=layout == FSDP and policy.gradient_sync == "step",
        entropy_gradient=policy.objective.needs_entropy,
        micro_batch_tokens=policy.micro_batch_tokens,
        gradient_checkpointing=policy.gradient_checkpointing,
        problems=data.problems_per_iteration,
        group_size=data.group_size,
        minibatches=data.minibatches,
        ppo_epochs=data.ppo_epochs,
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=data.sampling.max_new_tokens,
        evaluation_tokens=_longest_evaluation(config.evaluation),
        image_pixels=data.image_pixels[1] if data.image_pixels else None,
        engine=_engine(data.engine, on_gpu, notes),
        iterations=max(0, trainer.max_epochs),
        notes=(*notes, *optimizer.notes),
        **settings_of(config.checkpoint),
    )


def count_devices(devices: Any, on_gpu: bool, notes: list[str]) -> int:
    """Number of processes on one node, as Lightning reads trainer.devices.

    Args:
        devices: A number, a list of indices, either as text, "auto" or -1.
        on_gpu: Whether the devices are GPUs.
        notes: Gets a sentence if all GPUs are asked for but none is here to count.
    """
    text = str(devices).strip("[] ()")
    if text in ("auto", "-1"):
        here = torch.cuda.device_count() if on_gpu else 1
        if not here:
            notes.append(f"trainer.devices is {text} and no GPU is here to count: this plan is for one")
        return max(1, here)
    try:
        places = [int(place) for place in text.split(",") if place.strip()]
    except ValueError:
        places = []
    is_list = isinstance(devices, list | tuple) or "," in text
    count = len(places) if is_list else sum(places)
    if count < 1:
        raise SettingError(f"trainer.devices is {devices}; use a number of devices, or a list of GPUs such as [0, 1]")
    return count


def _on_gpu(accelerator: str, for_card: bool) -> bool:
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        raise SettingError(f"trainer.accelerator is '{accelerator}', of which the plan knows nothing; use gpu or cpu")
    if accelerator == "cpu" and for_card:
        raise SettingError("--card_gib is given, but trainer.accelerator is cpu; set trainer.accelerator to gpu")
    return accelerator != "cpu"


def _strategy(given: Any, ranks: int) -> Any:
    """Makes a Lightning strategy, which starts nothing before a trainer has it."""
    if given == "auto":
        given = "single_device" if ranks == 1 else "ddp"
    try:
        if not isinstance(given, str):
            return object_at(given.class_path)(**dict(given.get("init_args") or {}))
        if given == "single_device":
            return SingleDeviceStrategy(torch.device("cpu"))
        return StrategyRegistry.get(given)
    except Exception as error:  # the class may raise any exception
        name = given if isinstance(given, str) else given.class_path
        raise SettingError(f"trainer.strategy is '{name}', which cannot be made: {reason(error)}") from error


def _layout(strategy: Any) -> str:
    """How the weights are distributed over the ranks."""
    for kind, layout in ((ModelParallelStrategy, FSDP), (DDPStrategy, DDP), (SingleDeviceStrategy, WHOLE)):
        if isinstance(strategy, kind):
            return layout
    raise SettingError(
        f"trainer.strategy is {type(strategy).__name__}, of which the plan knows nothing; use ddp, or "
        "ModelParallelStrategy (FSDP2)"
    )


def _engine(engine: RolloutEngine, on_gpu: bool, notes: list[str]) -> Engine:
    if isinstance(engine, VLLMEngine):
        level = engine.sleep_level
        return Engine(
            VLLM,
            share=engine.gpu_memory_utilization,
            sleep_level=(2 if level is None else level) if on_gpu else 0,
            cpu_cache=int(engine.cpu_cache_gib * 2**30),
            max_num_seqs=engine.max_num_seqs,
        )
    if isinstance(engine, TransformersEngine):
        return Engine(TRANSFORMERS, batch_size=engine.batch_size)
    if isinstance(engine, ServerEngine):
        return Engine(SERVERS)
    notes.append(f"data.engine is {type(engine).__name__}, whose memory the plan does not know and counts as nothing")
    return Engine(OTHER)


def _longest_evaluation(evaluation: Any) -> int:
    """Maximum response tokens of an evaluation."""
    per_benchmark = (evaluation.get("benchmarks") or {}).values()
    limits = [each.get("max_new_tokens") for each in per_benchmark if hasattr(each, "get")]
    return max((limit for limit in (evaluation.get("max_new_tokens"), *limits) if limit), default=0)


def _has_reference(policy: PolicyModule, data: RolloutDataModule) -> bool:
    """Whether the first policy is kept beside the trained one; with adapters it is the model without them."""
    asked = policy.objective.needs_reference or data.limits.need_reference or data.composer.needs_reference
    return asked and policy.lora is None
