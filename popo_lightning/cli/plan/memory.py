"""Bytes of a rank at the peaks of an iteration, from a run's settings and its model's sizes.

The estimate assumes:

- Gradients are freed after an optimizer step, autocast's copies of weights at the end of a training step, and what
  torch keeps in reserve before the engine wakes. Fragmentation of torch's memory is not counted.
- Attention keeps no scores: flash attention, or another fused kernel.
- A backward pass through a layer needs half as much again as the layer has kept (BACKWARD), for gradients.
- Under FSDP the parameters outside all layers are gathered during the whole pass, beside two layers: the running one
  and the next. Gradients of the largest of these exist once in the computing dtype and once in float32.
- CUDA's context, its libraries' workspaces, NCCL's buffers and a sleeping engine are constants.

docs/plan.md compares the estimate with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from popo_lightning.cli.plan.activations import Activations, activations
from popo_lightning.cli.plan.architecture import Architecture, architecture
from popo_lightning.cli.plan.run_settings import DDP, FSDP, TRANSFORMERS, VLLM, RunSettings
from popo_lightning.engines.vllm.batch import LARGE_CARD, batch_of
from popo_lightning.model.logprobs import chunk_rows
from popo_lightning.model.lora import Lora

GIB = 2**30
CUDA_CONTEXT = GIB  # context, kernels, cuBLAS's and cuDNN's workspaces
NCCL_BUFFERS = GIB
ASLEEP = GIB  # CUDA graphs and workspaces that a sleeping vLLM keeps
COUNT_BYTES = 4  # vLLM counts each sequence's tokens by kind, in a table of sequences x vocabulary
BACKWARD = 0.5
FOUR_BITS = 0.5 + 4 / 64  # bytes per parameter in NF4, with a float32 scale for each 64
LOGIT_BYTES, LOGIT_BYTES_WITH_ENTROPY = 12, 20  # bytes per element of a chunk: log-probs and their gradients in float32


@dataclass(frozen=True)
class Model:
    """A model given by its configuration.

    Args:
        config: transformers configuration.
        name: Name of the model, for messages.
        freeze_vision: Whether the vision tower is frozen.
        lora: Adapters, which are then the only trained weights; None without them.
    """

    config: Any
    name: str
    freeze_vision: bool = False
    lora: Lora | None = None
    _measured: dict[tuple[torch.dtype, bool], Activations] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """Sizes of the model."""
        return architecture(self.config, self.freeze_vision, self.name, self.lora)

    def activations(self, dtype: torch.dtype, autocast: bool) -> Activations:
        """What the model's forward pass keeps, measured once."""
        if (dtype, autocast) not in self._measured:
            of_model = self.config, self.name, dtype, autocast, self.lora, self.freeze_vision
            self._measured[dtype, autocast] = activations(*of_model)
        return self._measured[dtype, autocast]


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of the engine on a rank's device.

    Args:
        weights: The engine's own copy of the weights.
        cache: Keys and values.
        work: What the engine reserves for a step.
        resting: What the engine holds while the trainer works.
        sequence: Cache of one sequence of full length.
        sequences: Number of sequences of full length that the cache holds; None if there is no cache here.
    """

    weights: int = 0
    cache: int = 0
    work: int = 0
    resting: int = 0
    sequence: int = 0
    sequences: int | None = None

    @property
    def awake(self) -> int:
        """What the engine holds while it generates."""
        return self.weights + max(0, self.cache) + self.work


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, each part by name.

    Args:
        always: Parts from the first optimizer step on.
        backward: Further parts in the backward pass of a micro-batch.
        step: Further parts in the optimizer step.
        engine: Memory of the engine.
        checkpoint: One checkpoint on the disk, of all ranks together.
    """

    always: dict[str, int]
    backward: dict[str, int]
    step: dict[str, int]
    engine: EngineMemory
    checkpoint: int

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at each peak."""
        always = sum(self.always.values())
        return {
            "the backward pass of a micro-batch": always + self.engine.resting + sum(self.backward.values()),
            "the optimizer step": always + self.engine.resting + sum(self.step.values()),
            "generation, from the second iteration on": always + self.engine.awake,
        }


def estimate(run: RunSettings, model: Model, card: int | None) -> Memory:
    """Estimates the bytes of one rank.

    Args:
        run: Settings of the run.
        model: Model that is trained.
        card: Bytes of the card; None if there is none.
    """
    shape, weight = model.architecture, run.trained_bytes
    critic = shape.critic_trained + head_weights(run, shape)
    trained = shape.trained + (critic if run.has_critic else 0)
    mine = lambda elements, size: int(elements * size / run.shards)  # noqa: E731
    gradients = {
        "gradients": mine(trained, weight),
        "whole gradients until the last micro-batch": 4 * trained if run.gradients_held_whole else 0,
        "autocast copies of weights": _autocast_copies(run, shape),
        "gathered weights and their gradients": _gathered(run, shape),
    }
    return Memory(
        always={
            "weights": mine(1, weights_held(run, shape)),
            "reference": mine(shape.parameters, weight) if run.has_reference else 0,
            "target critic": mine(critic * run.critic_copies, weight),
            "optimizer state": mine(trained, run.optimizer.bytes_kept),
            "DDP buckets": weight * trained if run.layout == DDP and not run.bucket_view else 0,
            "CUDA context and libraries": (CUDA_CONTEXT + NCCL_BUFFERS * (run.ranks > 1)) if run.on_gpu else 0,
        },
        backward=gradients | activation_bytes(run, model, run.gradient_checkpointing),
        step=gradients
        | {
            "whole gradients until the last micro-batch": 0,
            "gathered weights and their gradients": 0,
            "temporaries of the optimizer": mine(trained, weight * run.optimizer.copies_in_step),
        },
        engine=_engine(run, shape, card),
        checkpoint=int(
            (weights_held(run, shape) if run.lora is None else trained * weight)
            + critic * run.critic_copies * weight
            + trained * run.optimizer.bytes_kept * run.checkpoint_has_optimizer
        ),
    )


def head_weights(run: RunSettings, shape: Architecture) -> int:
    """Number of parameters of a critic's linear heads.

    Args:
        run: Settings of the run.
        shape: Sizes of the model.
    """
    return run.critic_outputs * (shape.hidden + 1)


def weights_held(run: RunSettings, shape: Architecture) -> int:
    """Bytes of policy and critic weights over all ranks: adapters in float32, others in their dtype or in 4 bits.

    Args:
        run: Settings of the run.
        shape: Sizes of the model.
    """
    rounded = shape.matrices if run.lora is not None and run.lora.four_bit else 0

    def held(parameters: int, adapters: int) -> float:
        return (parameters - adapters - rounded) * run.weight_dtype.itemsize + 4 * adapters + rounded * FOUR_BITS

    found = held(shape.parameters, shape.adapters)
    if run.has_critic:
        found += held(shape.critic, shape.critic_adapters) + head_weights(run, shape) * run.trained_bytes
    return int(found)


def activation_bytes(run: RunSettings, model: Model, checkpointing: bool) -> dict[str, int]:
    """Bytes of one micro-batch with as many tokens as the budget allows.

    Args:
        run: Settings of the run.
        model: Model that is trained.
        checkpointing: Whether the backward pass computes layers again.
    """
    shape, tokens = model.architecture, run.pass_tokens
    sharded = run.layout == FSDP
    # autocast computes float32 adapters beside bfloat16 weights in bfloat16
    autocast = run.autocast and not sharded if run.lora is None else run.compute_dtype != torch.float32
    kept = model.activations(run.compute_dtype if sharded else run.weight_dtype, autocast)
    of_layers = kept.inputs if checkpointing else kept.layers
    language = of_layers + kept.outside + 2 * kept.state  # states that the head reads, and their gradients
    passes = 2 if run.has_critic else 1  # a critic's pass is kept beside the policy's
    rows = min(tokens, chunk_rows(shape.vocabulary, torch.device("cuda" if run.on_gpu else "cpu")))
    chunk = rows * shape.vocabulary * (LOGIT_BYTES_WITH_ENTROPY if run.entropy_gradient else LOGIT_BYTES)
    held = run.compute_dtype.itemsize + run.weight_dtype.itemsize
    if run.lora is not None:  # a frozen head has no gradient, and a copy only in another dtype
        held = run.compute_dtype.itemsize * run.autocast
    head = 0 if sharded else shape.vocabulary * shape.hidden * held
    layer = int(tokens * kept.largest * (BACKWARD + checkpointing))
    return {
        "activations": int(tokens * language * passes) + _vision(run, shape, checkpointing) * passes,
        # one comes after the other, so the larger counts
        "logits of a chunk and the head's gradient": chunk + head if chunk + head >= layer else 0,
        "one layer's backward pass": layer if layer > chunk + head else 0,
    }


def image_tokens(run: RunSettings, shape: Architecture) -> int:
    """Maximum image tokens of a prompt with one image: larger images are resized, and prompts have a limit."""
    if shape.vision is None:
        return 0
    most = run.prompt_tokens
    return most if run.image_pixels is None else min(most, -(-run.image_pixels // shape.vision.token_pixels))


def _vision(run: RunSettings, shape: Architecture, checkpointing: bool) -> int:
    """Bytes kept by a tower like Qwen-VL's: per patch and layer 14 states and 4 inner ones, or only the input."""
    if shape.vision is None or not shape.vision.trained:
        return 0
    vision = shape.vision
    share = image_tokens(run, shape) / run.sequence_tokens
    patches = run.pass_tokens * share * vision.patches
    width = vision.hidden if checkpointing else 14 * vision.hidden + 4 * vision.feed_forward
    return int(patches * vision.depth * width * run.compute_dtype.itemsize)


def _autocast_copies(run: RunSettings, shape: Architecture) -> int:
    if not run.autocast or run.layout == FSDP:
        return 0
    # every pass casts a frozen matrix anew, and keeps the copy for the gradient of its input
    frozen = shape.matrices if run.lora is not None and not run.gradient_checkpointing else 0
    critic = shape.critic_cast + frozen if run.has_critic else 0
    return run.compute_dtype.itemsize * (shape.cast + frozen + critic)


def _gathered(run: RunSettings, shape: Architecture) -> int:
    if run.layout != FSDP:
        return 0
    size = run.compute_dtype.itemsize
    return size * (shape.root + 2 * shape.layer) + (size + 4) * max(shape.root, shape.layer)


def _engine(run: RunSettings, shape: Architecture, card: int | None) -> EngineMemory:
    engine, size = run.engine, run.compute_dtype.itemsize
    weights, sequence = size * (shape.parameters - shape.adapters), size * shape.cache_elements * run.engine_tokens
    if engine.kind == VLLM:
        if run.on_gpu:
            work = _vllm_work(run, shape, card)
            cache = sequence if card is None else int(engine.share * card) - weights - work
        else:
            work, cache = 0, engine.cpu_cache
        awake = weights + max(0, cache) + work
        resting = awake if engine.sleep_level == 0 else ASLEEP
        return EngineMemory(weights, cache, work, resting, sequence, max(0, cache) // sequence)
    if engine.kind == TRANSFORMERS:
        batch = max(1, min(engine.batch_size, run.rank_sequences))
        work = batch * shape.vocabulary * LOGIT_BYTES
        return EngineMemory(weights, batch * sequence, work, weights, sequence, batch)
    return EngineMemory()  # nothing on this device, or an unknown engine


def _vllm_work(run: RunSettings, shape: Architecture, card: int | None) -> int:
    """Bytes that vLLM reserves for its largest step; on an unknown card, those on a large one."""
    batch = batch_of(run.engine.max_num_seqs, run.rank_sequences, LARGE_CARD if card is None else card, run.card_name)
    tokens = min(batch.tokens, batch.sequences * run.engine_tokens)
    states = tokens * (4 * shape.hidden + 3 * shape.feed_forward) * run.compute_dtype.itemsize
    return states + batch.sequences * shape.vocabulary * (LOGIT_BYTES + COUNT_BYTES)
