"""Bytes of a rank at the moments of an iteration, from a run's settings and its model's numbers.

An estimate, with these assumptions:

- Gradients are freed after an optimizer step, autocast's copies of weights at the end of a training step, and what
  torch keeps in reserve before the engine wakes. Fragmentation of torch's memory is not counted.
- Attention keeps no scores: flash attention, or another fused kernel.
- A backward pass through a layer needs half as much again as the layer has kept (BACKWARD), for gradients.
- Under FSDP the parameters outside all layers are gathered as long as a pass takes, beside two layers: the one that is
  run and the next. Gradients of the largest of these are there once in the computing type and once in float32.
- CUDA's context, its libraries' workspaces, NCCL's buffers and a sleeping engine are constants.

docs/plan.md says how far it has been from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from popo_lightning.model.logprobs import chunk_rows
from popo_lightning.plan.activations import Activations, activations
from popo_lightning.plan.architecture import Architecture, architecture
from popo_lightning.plan.run_settings import DDP, FSDP, TRANSFORMERS, VLLM, RunSettings

GIB = 2**30
CUDA_CONTEXT = GIB  # context, kernels, cuBLAS's and cuDNN's workspaces
NCCL_BUFFERS = GIB
ASLEEP = GIB  # CUDA graphs and workspaces that vLLM's sleep leaves
ENGINE_TOKENS, ENGINE_SEQUENCES = 16384, 256  # of one step of vLLM's, which it sets memory aside for
BACKWARD = 0.5
LOGIT_BYTES, LOGIT_BYTES_WITH_ENTROPY = 12, 20  # of an element of a chunk: log-probs and their gradients in float32


@dataclass(frozen=True)
class Model:
    """A model by its configuration.

    Args:
        config: Of transformers.
        name: For messages.
        freeze_vision: Whether the vision tower stays as it is.
    """

    config: Any
    name: str
    freeze_vision: bool = False
    _measured: dict[tuple[torch.dtype, bool], Activations] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """Its numbers."""
        return architecture(self.config, self.freeze_vision, self.name)

    def activations(self, dtype: torch.dtype, autocast: bool) -> Activations:
        """Of its forward pass, measured once."""
        if (dtype, autocast) not in self._measured:
            self._measured[dtype, autocast] = activations(self.config, self.name, dtype, autocast)
        return self._measured[dtype, autocast]


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of the engine on a rank's device.

    Args:
        weights: Its own copy.
        cache: Keys and values.
        work: What it sets aside for a step.
        resting: While the trainer works.
        sequence: Of the cache, for one of full length.
        sequences: Of full length that the cache holds; None where there is no cache here.
    """

    weights: int = 0
    cache: int = 0
    work: int = 0
    resting: int = 0
    sequence: int = 0
    sequences: int | None = None

    @property
    def awake(self) -> int:
        """While it generates."""
        return self.weights + max(0, self.cache) + self.work


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, each part by name.

    Args:
        always: From the first optimizer step on.
        backward: Further, in the backward pass of a micro-batch.
        step: Further, in the optimizer step.
        engine: Of the engine.
        checkpoint: One checkpoint on the disk, of all ranks.
    """

    always: dict[str, int]
    backward: dict[str, int]
    step: dict[str, int]
    engine: EngineMemory
    checkpoint: int

    @property
    def peaks(self) -> dict[str, int]:
        """By moment."""
        always = sum(self.always.values())
        return {
            "the backward pass of a micro-batch": always + self.engine.resting + sum(self.backward.values()),
            "the optimizer step": always + self.engine.resting + sum(self.step.values()),
            "generation, from the second iteration on": always + self.engine.awake,
        }


def estimate(run: RunSettings, model: Model, card: int | None) -> Memory:
    """Bytes of one rank.

    Args:
        run: Its settings.
        model: What is trained.
        card: Bytes of the card; None where there is none.
    """
    shape, weight = model.architecture, run.weight_dtype.itemsize
    critic = shape.critic + shape.hidden + 1 if run.has_critic else 0
    trained = shape.trained + (shape.critic_trained + shape.hidden + 1 if run.has_critic else 0)
    mine = lambda elements, size: int(elements * size / run.shards)  # noqa: E731
    gradients = {
        "gradients": mine(trained, weight),
        "whole gradients until the last micro-batch": 4 * trained if run.gradients_held_whole else 0,
        "autocast copies of weights": _autocast_copies(run, shape),
        "gathered weights and their gradients": _gathered(run, shape),
    }
    return Memory(
        always={
            "weights": mine(shape.parameters + critic, weight),
            "reference": mine(shape.parameters, weight) if run.has_reference else 0,
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
            (shape.parameters + critic) * weight + trained * run.optimizer.bytes_kept * run.checkpoint_has_optimizer
        ),
    )


def activation_bytes(run: RunSettings, model: Model, checkpointing: bool) -> dict[str, int]:
    """Of one micro-batch of as many tokens as the budget allows.

    Args:
        run: Its settings.
        model: What is trained.
        checkpointing: Whether layers are computed again in the backward pass.
    """
    shape, tokens = model.architecture, run.pass_tokens
    sharded = run.layout == FSDP
    kept = model.activations(run.compute_dtype if sharded else run.weight_dtype, run.autocast and not sharded)
    of_layers = kept.inputs if checkpointing else kept.layers
    language = of_layers + kept.outside + 2 * kept.state  # states and gradients of those that the head reads
    passes = 2 if run.has_critic else 1  # a critic's pass is kept beside the policy's
    rows = min(tokens, chunk_rows(shape.vocabulary, torch.device("cuda" if run.on_gpu else "cpu")))
    chunk = rows * shape.vocabulary * (LOGIT_BYTES_WITH_ENTROPY if run.entropy_gradient else LOGIT_BYTES)
    head = 0 if sharded else shape.vocabulary * shape.hidden * (run.compute_dtype.itemsize + run.weight_dtype.itemsize)
    layer = int(tokens * kept.largest * (BACKWARD + checkpointing))
    return {
        "activations": int(tokens * language * passes) + _vision(run, shape, checkpointing) * passes,
        # one after the other, so the larger of them
        "logits of a chunk and the head's gradient": chunk + head if chunk + head >= layer else 0,
        "one layer's backward pass": layer if layer > chunk + head else 0,
    }


def image_tokens(run: RunSettings, shape: Architecture) -> int:
    """Most image tokens of a prompt, with one image: a larger one is resized, and a prompt has its limit."""
    if shape.vision is None:
        return 0
    most = run.prompt_tokens
    return most if run.image_pixels is None else min(most, -(-run.image_pixels // shape.vision.token_pixels))


def _vision(run: RunSettings, shape: Architecture, checkpointing: bool) -> int:
    """Kept by a vision tower of Qwen-VL's build: per patch and layer 14 states and 4 inner ones, or the input alone."""
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
    return run.compute_dtype.itemsize * (shape.cast + (shape.critic_cast if run.has_critic else 0))


def _gathered(run: RunSettings, shape: Architecture) -> int:
    if run.layout != FSDP:
        return 0
    size = run.compute_dtype.itemsize
    return size * (shape.root + 2 * shape.layer) + (size + 4) * max(shape.root, shape.layer)


def _engine(run: RunSettings, shape: Architecture, card: int | None) -> EngineMemory:
    engine, size = run.engine, run.compute_dtype.itemsize
    weights, sequence = size * shape.parameters, size * shape.cache_elements * run.engine_tokens
    if engine.kind == VLLM:
        if run.on_gpu:
            work = ENGINE_TOKENS * (4 * shape.hidden + 3 * shape.feed_forward) * size
            work += ENGINE_SEQUENCES * shape.vocabulary * LOGIT_BYTES
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
    return EngineMemory()  # nothing on this device, or nothing that is known
