"""On CUDA, compares packed tokens with flex_attention, and log-probs in big chunks, with plain rows."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row
from popo_lightning.model import logprobs
from popo_lightning.model.attention import use_packed_attention
from popo_lightning.model.logprobs import fuses
from popo_lightning.model.padded_rows import PaddedRows, pad_rows, pad_sequences
from popo_lightning.model.scoring import response_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "heads of 64": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2),
    "7 heads to a key": Qwen2Config(**SHAPE, num_attention_heads=14, num_key_value_heads=2, head_dim=32),
    "heads of 128": Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=1, head_dim=128),
    "heads of 48": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=4, head_dim=48),
}


def models(config: Any) -> tuple[Any, Any]:
    """Returns (sdpa model, block-attention model) with the same weights."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().cuda()
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval().cuda()
    packed.load_state_dict(plain.state_dict())
    use_packed_attention(packed)
    return plain, packed


def drawn(groups: int, responses: int, prompt: int, longest: int, seed: int = 0) -> list[list[Row]]:
    draw, generator, rows = Random(seed), torch.Generator().manual_seed(seed), []
    for group in range(groups):
        ids = torch.randint(1, 1000, (draw.randint(1, prompt),), generator=generator)
        made = []
        for i in range(responses):
            tokens = torch.randint(1, 1000, (draw.randint(1, longest),), generator=generator)
            made.append(Row(responses * group + i, ids, Response(tokens, torch.zeros(len(tokens)), "stop")))
        rows.append(made)
    return rows


def scored(model: Any, part: PaddedRows, dtype: torch.dtype) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Returns the log-probs of each row, and the gradients of a loss that differs between tokens."""
    model.zero_grad()
    part = part.to(torch.device("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logp, _ = response_logprobs(model, part, 1.0, (), False)
    found = {index: row[mask] for index, row, mask in zip(part.index.tolist(), logp, part.mask, strict=True)}
    loss = sum((torch.sin(torch.arange(len(row), device="cuda") + index) * row).sum() for index, row in found.items())
    assert isinstance(loss, Tensor)
    (loss / len(found)).backward()
    return {index: row.detach() for index, row in found.items()}, [p.grad.clone() for p in model.parameters()]


def assert_like(found: Any, expected: Any, atol: float, rtol: float) -> None:
    for index, row in expected[0].items():
        torch.testing.assert_close(found[0][index], row, atol=atol, rtol=0)
    for mine, plain in zip(found[1], expected[1], strict=True):
        assert plain.norm() > 0 and (mine - plain).norm() <= rtol * plain.norm()


@pytest.fixture(autouse=True)
def exact_matrices() -> Any:
    """Turns off TensorFloat-32, whose rounding would exceed the differences under test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_tokens_give_what_plain_rows_give(kind: str) -> None:
    plain, packed = models(CONFIGS[kind])
    for seed, (groups, responses, prompt, longest) in enumerate([(3, 4, 60, 90), (1, 5, 300, 200), (7, 2, 20, 700)]):
        rows = drawn(groups, responses, prompt, longest, seed)
        apart = scored(plain, pad_rows([row for group in rows for row in group]), torch.float32)
        found = scored(packed, pad_sequences(rows), torch.float32)
        assert_like(found, apart, 2e-5, 2e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_rounds_packed_tokens_no_more(kind: str) -> None:
    plain, packed = models(CONFIGS[kind])
    rows = drawn(3, 4, 60, 300)
    apart, together = pad_rows([row for group in rows for row in group]), pad_sequences(rows)
    exact, rounded, found = (
        scored(model, part, dtype)
        for model, part, dtype in (
            (plain, apart, torch.float32),
            (plain, apart, torch.bfloat16),
            (packed, together, torch.bfloat16),
        )
    )

    def error(of: Any) -> tuple[float, float]:
        logp = torch.cat([of[0][index] - row for index, row in exact[0].items()]).abs().mean()
        gradient = sum(float((mine - true).norm() / true.norm()) for mine, true in zip(of[1], exact[1], strict=True))
        return float(logp), gradient

    for mine, other in zip(error(found), error(rounded), strict=True):
        assert 0 < mine < 2 * other


def test_16k_packed_tokens_hold_no_square_of_them() -> None:
    """One mask of 16384 x 16384 would be 0.25 GiB of booleans or 0.5 GiB of bfloat16."""
    _, packed = models(CONFIGS["heads of 64"])
    rows = [Row(0, torch.ones(1024, dtype=torch.long), Response(torch.ones(1), torch.zeros(1), "stop"))]
    answers = [torch.randint(1, 1000, (1024,)) for _ in range(15)]
    rows = [Row(i, rows[0].prompt_ids, Response(tokens, torch.zeros(1024), "stop")) for i, tokens in enumerate(answers)]
    part = pad_sequences([rows])
    assert part.input_ids.shape == (1, 16384)
    scored(packed, part, torch.bfloat16)  # compiled
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    states: list[int] = []
    base = packed.base_model
    base.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.reset_peak_memory_stats())
    base.layers[0].register_forward_hook(lambda *_: states.append(torch.cuda.max_memory_allocated() - before))
    scored(packed, part, torch.bfloat16)
    assert states and states[0] < 0.25 * 2**30


def test_passes_of_many_lengths_are_compiled_once_or_twice() -> None:
    from torch._dynamo.utils import counters

    _, packed = models(CONFIGS["heads of 64"])
    scored(packed, pad_sequences(drawn(2, 3, 100, 300, 1)), torch.bfloat16)
    scored(packed, pad_sequences(drawn(3, 3, 100, 300, 2)), torch.bfloat16)
    before = counters["stats"]["unique_graphs"]
    for seed in range(3, 9):
        scored(packed, pad_sequences(drawn(seed, 3, 100, 300, seed)), torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_log_probs_with_their_gradient_written_out(entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.nn.Linear(64, 5000, bias=False, device="cuda")
    targets, hidden = torch.randint(5000, (300,), device="cuda"), torch.randn(300, 64, device="cuda")
    monkeypatch.setattr(logprobs, "CUDA_CHUNK_ELEMENTS", 5000 * 77)
    assert fuses(head)

    def found() -> list[Tensor]:
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        logp, entropy = logprobs.token_logprobs(states, head, targets, 0.7, (4, 9), entropy_gradient)
        (logp * torch.linspace(-1, 2, 300, device="cuda") + 0.3 * entropy * entropy_gradient).sum().backward()
        assert states.grad is not None and head.weight.grad is not None
        return [logp.detach(), entropy.detach(), states.grad, head.weight.grad]

    mine = found()
    monkeypatch.setattr(logprobs, "fuses", lambda head: False)
    for one, plain in zip(mine, found(), strict=True):
        torch.testing.assert_close(one, plain, atol=2e-5, rtol=2e-5)
