"""Every line of the plan's memory, checked against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plan import (
    CRITIC,
    EMBEDDING,
    IN_MATRICES,
    KEPT,
    KEPT_SHARDED,
    LAYER,
    TINY,
    GivenActivations,
    model,
)

from popo_lightning.cli.plan.activations import LENGTHS, Activations, _KeptBytes, activations
from popo_lightning.cli.plan.architecture import Vision
from popo_lightning.cli.plan.memory import ASLEEP, GIB, activation_bytes, estimate, image_tokens
from popo_lightning.cli.plan.optimizer_state import ADAM, OptimizerState, optimizer_state
from popo_lightning.cli.plan.run_settings import DDP, FSDP, TRANSFORMERS, VLLM, Engine, RunSettings
from popo_lightning.model.logprobs import chunk_rows

TOKENS = 2048  # tokens of a pass: one sequence of 1024 + 1024
SGD = OptimizerState(0.0, 0)
BF16 = torch.bfloat16
MIXED: dict[str, Any] = {"autocast": True}
SHARDED: dict[str, Any] = {"autocast": True, "layout": FSDP, "ranks": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GivenActivations:
    return GivenActivations(model("tiny", tmp_path_factory.mktemp("tiny")).architecture)


def settings(**changes: Any) -> RunSettings:
    return replace(RunSettings(micro_batch_tokens=TOKENS), **changes)


def parts(of: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in of.items() if size}


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("math_1p5b", 1_777_088_000),
        ("math_7b", 7_615_616_512),
        ("countdown_3b", 3_085_938_688),
        ("geometry_vl3b", 3_754_622_976),
        ("tiny", TINY),
    ],
)
def test_parameters_are_those_published(name: str, parameters: int, tmp_path: Path) -> None:
    assert model(name, tmp_path).architecture.parameters == parameters


def test_parts_of_a_model(tiny: GivenActivations) -> None:
    shape = tiny.architecture
    assert (shape.trained, shape.cast, shape.layer, shape.root) == (TINY, IN_MATRICES, LAYER, TINY - 2 * LAYER)
    assert (shape.critic, shape.critic_trained) == (CRITIC - 65, CRITIC - 65)
    assert shape.critic_cast == IN_MATRICES - EMBEDDING  # all matrices except the head
    assert (shape.vocabulary, shape.hidden, shape.feed_forward) == (100, 64, 96)
    assert shape.cache_elements == 2 * 2 * 2 * 32  # keys and values, layers, heads, width
    assert shape.vision is None


def test_a_tied_head_is_counted_once_and_copied_once(tmp_path: Path) -> None:
    shape = model("countdown_3b", tmp_path).architecture
    embedding = 151936 * 2048
    assert shape.root == embedding + 2048
    norms = 2048 * (2 * 36 + 1)
    assert shape.cast == shape.parameters - norms
    assert shape.critic == shape.parameters and shape.critic_cast == shape.cast - embedding


def test_a_frozen_vision_tower_is_not_trained(tmp_path: Path) -> None:
    whole, frozen = (model("geometry_vl3b", tmp_path, freeze).architecture for freeze in (False, True))
    assert frozen.parameters == whole.parameters == whole.trained
    assert whole.trained - frozen.trained == 668_684_288  # published size of Qwen2.5-VL's tower, merger 2048 wide
    assert whole.vision is not None and frozen.vision is not None
    assert whole.vision.trained and not frozen.vision.trained
    assert (whole.vision.depth, whole.vision.hidden, whole.vision.feed_forward) == (32, 1280, 3420)
    assert (whole.vision.patches, whole.vision.token_pixels) == (4, 28 * 28)


# -- state ---------------------------------------------------------------------------------------------------------


def test_one_device_in_float32(tiny: GivenActivations) -> None:
    memory = estimate(settings(on_gpu=False, optimizer=replace(ADAM, copies_in_step=0)), tiny, None)
    assert parts(memory.always) == {"weights": 4 * TINY, "optimizer state": 8 * TINY}
    chunk = TOKENS * 100 * 12 + EMBEDDING * (4 + 4)
    assert parts(memory.backward) == {
        "gradients": 4 * TINY,
        "activations": TOKENS * (KEPT.layers + KEPT.outside + 2 * KEPT.state),
        "logits of a chunk and the head's gradient": chunk,
    }
    assert parts(memory.step) == {"gradients": 4 * TINY}
    assert memory.checkpoint == 12 * TINY
    assert list(memory.peaks.values()) == [
        12 * TINY + sum(memory.backward.values()),
        16 * TINY,
        12 * TINY,
    ]


def test_mixed_precision_keeps_copies_of_matrices(tiny: GivenActivations) -> None:
    memory = estimate(settings(**MIXED), tiny, None)
    assert memory.backward["autocast copies of weights"] == memory.step["autocast copies of weights"] == 2 * IN_MATRICES
    assert memory.backward["logits of a chunk and the head's gradient"] == TOKENS * 100 * 12 + EMBEDDING * (2 + 4)
    assert memory.step["temporaries of the optimizer"] == 4 * TINY
    assert memory.always["weights"] == 4 * TINY


def test_bfloat16_weights(tiny: GivenActivations) -> None:
    run = settings(weight_dtype=BF16, optimizer=OptimizerState(4.0, 1))
    memory = estimate(run, tiny, None)
    assert (memory.always["weights"], memory.always["optimizer state"]) == (2 * TINY, 4 * TINY)
    assert memory.backward["gradients"] == memory.step["temporaries of the optimizer"] == 2 * TINY
    assert not memory.backward["autocast copies of weights"]
    assert memory.backward["logits of a chunk and the head's gradient"] == TOKENS * 100 * 12 + EMBEDDING * (2 + 2)


def test_a_gpu_has_a_context_and_several_have_buffers(tiny: GivenActivations) -> None:
    sizes = [estimate(settings(ranks=ranks), tiny, None).always["CUDA context and libraries"] for ranks in (1, 2)]
    assert sizes == [GIB, 2 * GIB]


@pytest.mark.parametrize("view", [False, True])
def test_ddp_has_buckets_unless_they_are_the_gradients(view: bool, tiny: GivenActivations) -> None:
    memory = estimate(settings(layout=DDP, ranks=4, bucket_view=view), tiny, None)
    assert memory.always["DDP buckets"] == (0 if view else 4 * TINY)
    assert memory.always["weights"] == 4 * TINY and memory.always["optimizer state"] == 8 * TINY


def test_sharded(tiny: GivenActivations) -> None:
    memory = estimate(settings(**SHARDED), tiny, None)
    assert parts(memory.always) == {
        "weights": TINY,
        "optimizer state": 2 * TINY,
        "CUDA context and libraries": 2 * GIB,
    }
    root = 2 * EMBEDDING + 64
    assert parts(memory.backward) == {
        "gradients": TINY,
        "gathered weights and their gradients": 2 * (root + 2 * LAYER) + (2 + 4) * LAYER,
        "activations": TOKENS * (KEPT_SHARDED.layers + KEPT_SHARDED.outside + 2 * KEPT_SHARDED.state),
        "logits of a chunk and the head's gradient": TOKENS * 100 * 12,
    }
    assert parts(memory.step) == {"gradients": TINY, "temporaries of the optimizer": TINY}
    assert memory.checkpoint == 12 * TINY  # over all ranks


def test_gradients_held_whole_until_the_last_micro_batch(tiny: GivenActivations) -> None:
    memory = estimate(settings(**SHARDED, gradients_held_whole=True), tiny, None)
    assert memory.backward["whole gradients until the last micro-batch"] == 4 * TINY
    assert not memory.step["whole gradients until the last micro-batch"]


def test_reference(tiny: GivenActivations) -> None:
    assert estimate(settings(has_reference=True), tiny, None).always["reference"] == 4 * TINY
    assert estimate(settings(**SHARDED, has_reference=True), tiny, None).always["reference"] == TINY


def test_critic(tiny: GivenActivations) -> None:
    memory = estimate(settings(**MIXED, layout=DDP, has_critic=True), tiny, None)
    both = TINY + CRITIC
    assert memory.always["weights"] == memory.backward["gradients"] == memory.always["DDP buckets"] == 4 * both
    assert memory.always["optimizer state"] == 8 * both and memory.checkpoint == 12 * both
    assert memory.backward["autocast copies of weights"] == 2 * (2 * IN_MATRICES - EMBEDDING)
    assert memory.backward["activations"] == 2 * TOKENS * (KEPT.layers + KEPT.outside + 2 * KEPT.state)


def test_critic_with_a_target_and_wider_heads(tiny: GivenActivations) -> None:
    plain = estimate(settings(has_critic=True), tiny, None)
    memory = estimate(settings(has_critic=True, critic_outputs=5, critic_copies=2), tiny, None)
    heads = 4 * (tiny.architecture.hidden + 1)
    assert plain.always["target critic"] == 0 and memory.always["target critic"] == 2 * 4 * (CRITIC + heads)
    assert memory.always["weights"] == plain.always["weights"] + 4 * heads
    assert memory.checkpoint == plain.checkpoint + 12 * heads + memory.always["target critic"]


def test_checkpoint_of_weights_alone(tiny: GivenActivations) -> None:
    assert estimate(settings(checkpoint_has_optimizer=False), tiny, None).checkpoint == 4 * TINY
    assert estimate(settings(optimizer=SGD), tiny, None).checkpoint == 4 * TINY


# -- activations ---------------------------------------------------------------------------------------------------


def test_with_checkpointing_inputs_stay_and_a_layer_is_computed_again(tiny: GivenActivations) -> None:
    run = settings(micro_batch_tokens=2 * TOKENS)
    found = activation_bytes(run, tiny, checkpointing=True)
    assert found["activations"] == 2 * TOKENS * (KEPT.inputs + KEPT.outside + 2 * KEPT.state)
    logits, layer = 2 * TOKENS * 100 * 12 + EMBEDDING * 8, 2 * TOKENS * 600 * 3 // 2
    assert logits > layer and found["logits of a chunk and the head's gradient"] == logits
    assert not found["one layer's backward pass"]


def test_the_larger_of_a_chunk_and_a_layer(tiny: GivenActivations) -> None:
    tiny = GivenActivations(replace(tiny.architecture, vocabulary=10))
    found = activation_bytes(settings(), tiny, checkpointing=True)
    assert found["one layer's backward pass"] == TOKENS * 900
    assert not found["logits of a chunk and the head's gradient"]
    assert activation_bytes(settings(), tiny, checkpointing=False)["one layer's backward pass"] == TOKENS * 300


def test_entropy_with_gradient_keeps_more_of_a_chunk(tiny: GivenActivations) -> None:
    found = activation_bytes(settings(entropy_gradient=True), tiny, checkpointing=False)
    assert found["logits of a chunk and the head's gradient"] == TOKENS * 100 * 20 + EMBEDDING * 8


def test_a_chunk_has_no_more_rows_than_it_may(tiny: GivenActivations) -> None:
    rows = chunk_rows(100, torch.device("cpu"))
    run = settings(on_gpu=False, micro_batch_tokens=2 * rows, response_tokens=rows, prompt_tokens=rows)
    found = activation_bytes(run, tiny, checkpointing=True)
    layer = found["one layer's backward pass"]
    assert layer == 2 * rows * 900 > rows * 100 * 12  # the chunk has only its rows, or it would be larger


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"micro_batch_tokens": 5000}, 5000),
        ({"micro_batch_tokens": 100}, 2048),  # a longer row gets its own pass
        ({"micro_batch_tokens": 10**9, "problems": 4, "minibatches": 2, "group_size": 3}, 2 * 3 * 2048),
        ({"micro_batch_tokens": 10**9, "problems": 8, "ranks": 4, "minibatches": 2, "group_size": 3}, 3 * 2048),
    ],
)
def test_tokens_of_a_pass(changes: dict[str, Any], tokens: int) -> None:
    assert settings(**changes).pass_tokens == tokens


def test_vision_tower(tiny: GivenActivations) -> None:
    vision = Vision(depth=3, hidden=8, feed_forward=16, patches=4, token_pixels=784, trained=True)
    seeing = GivenActivations(replace(tiny.architecture, vision=vision))
    run = settings(image_pixels=784 * 512)
    assert image_tokens(run, seeing.architecture) == 512
    assert image_tokens(settings(), seeing.architecture) == 1024  # the limit of a prompt
    assert image_tokens(settings(image_pixels=10**9), seeing.architecture) == 1024
    more = [
        activation_bytes(run, seeing, checkpointing)["activations"]
        - activation_bytes(run, tiny, checkpointing)["activations"]
        for checkpointing in (False, True)
    ]
    patches = 512 * 4  # a quarter of the pass, four patches per token
    assert more == [patches * 3 * (14 * 8 + 4 * 16) * 4, patches * 3 * 8 * 4]
    frozen = GivenActivations(replace(tiny.architecture, vision=replace(vision, trained=False)))
    assert activation_bytes(run, frozen, True) == activation_bytes(run, tiny, True)


def test_activations_of_a_llama(tmp_path: Path) -> None:
    """Compares with the tensors that a layer is known to keep, for states 64 wide, 2 heads and an inner width of 96."""
    measured = model("tiny", tmp_path)
    whole = measured.activations(torch.float32, False)
    # 2 norms: input, normalized, weighted; q, k, v and the output of attention; gate, up, activated and product.
    least = 4 * (2 * 3 * 64 + 4 * 64 + 4 * 96)
    assert least < whole.layers / 2 < 1.25 * least
    assert whole.inputs == 2 * 64 * 4 and whole.state == 64 * 4
    half = measured.activations(torch.bfloat16, False)
    assert half.inputs == whole.inputs / 2
    # Weights copied by autocast are not activations: a copy for each token would be far larger than they are.
    mixed = measured.activations(torch.float32, True)
    assert half.layers < mixed.layers < whole.layers
    assert mixed.inputs == whole.inputs


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_of_experts(autocast: bool) -> None:
    """Compares with a pass on real numbers. The weights are float32, for which torch's operator has no shapes."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 23, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(**sizes, **experts)
    planned = activations(config, "tiny", torch.float32, autocast)
    short, long = (_KeptBytes(Qwen3MoeForCausalLM(config).train()).of_pass(n, autocast) for n in LENGTHS)
    real = Activations(*((b - a) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(short, long, strict=True)))
    assert planned.inputs == real.inputs and planned.state == real.state
    assert real.layers <= planned.layers < 1.12 * real.layers  # attention with real numbers keeps slightly less


# -- engine --------------------------------------------------------------------------------------------------------

CACHE_TOKEN = 256  # elements


@pytest.mark.parametrize(("level", "resting"), [(0, 2 * GIB), (1, ASLEEP), (2, ASLEEP)])
def test_vllm_takes_its_share(level: int, resting: int, tiny: GivenActivations) -> None:
    run = settings(engine=Engine(VLLM, share=0.5, sleep_level=level), **MIXED)
    memory = estimate(run, tiny, 4 * GIB)
    engine = memory.engine
    assert engine.weights == 2 * TINY
    assert engine.work == 8192 * (4 * 64 + 3 * 96) * 2 + 256 * 100 * 16
    assert engine.awake == 2 * GIB == engine.weights + engine.work + engine.cache
    assert engine.sequences == engine.cache // (2 * CACHE_TOKEN * 2048)
    assert engine.resting == resting
    always = sum(memory.always.values())
    assert list(memory.peaks.values()) == [
        always + resting + sum(memory.backward.values()),
        always + resting + sum(memory.step.values()),
        always + 2 * GIB,
    ]


@pytest.mark.parametrize(
    ("gib", "name", "changes", "setting", "tokens", "sequences"),
    [
        (24, "", {}, None, 8192, 256),
        (24, "", {"problems": 64, "ranks": 2}, None, 8192, 256),
        (24, "", {"problems": 64}, None, 8192, 512),  # as many as a rank samples
        (24, "", {"problems": 512}, None, 8192, 1024),
        (24, "", {"problems": 64}, 100, 8192, 100),
        (24, "", {"prompt_tokens": 10, "response_tokens": 10}, 100, 100 * 20, 100),
        (79, "NVIDIA A100-SXM4-80GB", {}, None, 8192, 256),
        (79, "NVIDIA H100 80GB HBM3", {}, None, 16384, 1024),
        (180, "NVIDIA B200", {}, None, 16384, 1024),
        (None, "", {}, None, 16384, 1024),
    ],
)
def test_vllms_largest_step_follows_the_card(
    gib: int | None,
    name: str,
    changes: dict[str, int],
    setting: int | None,
    tokens: int,
    sequences: int,
    tiny: GivenActivations,
) -> None:
    run = settings(engine=Engine(VLLM, max_num_seqs=setting), card_name=name, **changes)
    work = estimate(run, tiny, None if gib is None else gib * GIB).engine.work
    assert work == tokens * (4 * 64 + 3 * 96) * 4 + sequences * 100 * (12 + 4)


def test_an_engine_makes_room_for_an_evaluation(tiny: GivenActivations) -> None:
    sizes = [
        estimate(settings(engine=Engine(VLLM), evaluation_tokens=tokens), tiny, None).engine.cache
        for tokens in (0, 1000, 3072)
    ]
    assert sizes == [4 * CACHE_TOKEN * 2048, 4 * CACHE_TOKEN * 2048, 4 * CACHE_TOKEN * 4096]


def test_vllm_on_a_cpu_takes_the_cache_it_is_given(tiny: GivenActivations) -> None:
    engine = estimate(settings(on_gpu=False, engine=Engine(VLLM, cpu_cache=GIB)), tiny, None).engine
    assert (engine.weights, engine.cache, engine.work) == (4 * TINY, GIB, 0)
    assert engine.resting == engine.awake == GIB + 4 * TINY
    assert engine.sequences == GIB // (4 * CACHE_TOKEN * 2048)


@pytest.mark.parametrize(("batch_size", "responses"), [(7, 7), (10**6, 256)])
def test_transformers_engine(batch_size: int, responses: int, tiny: GivenActivations) -> None:
    engine = estimate(settings(engine=Engine(TRANSFORMERS, batch_size=batch_size)), tiny, None).engine
    assert engine.cache == responses * 4 * CACHE_TOKEN * 2048
    assert engine.work == responses * 100 * 12
    assert engine.resting == engine.weights == 4 * TINY
    assert engine.sequences == responses


def test_servers_take_nothing_here(tiny: GivenActivations) -> None:
    memory = estimate(settings(), tiny, None)
    assert memory.engine.awake == memory.engine.resting == 0
    assert memory.peaks["generation, from the second iteration on"] == sum(memory.always.values())


# -- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "dtype", "size"),
    [
        (lambda groups: torch.optim.AdamW(groups, lr=1e-3), torch.float32, 8),
        (lambda groups: torch.optim.Adam(groups, lr=1e-3), torch.bfloat16, 4),
        (lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True), torch.float32, 12),
        (lambda groups: torch.optim.SGD(groups, lr=1e-3), torch.float32, 0),
        (lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9), torch.float32, 4),
        (lambda groups: torch.optim.RMSprop(groups, lr=1e-3), torch.float32, 4),
    ],
)
def test_optimizer_state(make: Any, dtype: torch.dtype, size: float) -> None:
    assert optimizer_state(make, dtype, on_gpu=True) == OptimizerState(size, 1)


def test_copies_of_a_step() -> None:
    make = lambda **more: lambda groups: torch.optim.AdamW(groups, lr=1e-3, **more)  # noqa: E731
    copies = [
        optimizer_state(make(), torch.float32, on_gpu=False),
        optimizer_state(make(fused=True), torch.float32, on_gpu=True),
        optimizer_state(make(foreach=False), torch.float32, on_gpu=True),
        optimizer_state(make(foreach=True), torch.float32, on_gpu=True),
    ]
    assert [found.copies_in_step for found in copies] == [0, 0, 0, 1]


def test_an_optimizer_that_takes_no_step_is_assumed_to_be_adam() -> None:
    found = optimizer_state(lambda groups: torch.optim.LBFGS(groups[0]["params"]), torch.float32, on_gpu=True)
    assert (found.bytes_kept, found.copies_in_step) == (8, 1)
    assert "TypeError" in found.notes[0] and "Adam" in found.notes[0]
