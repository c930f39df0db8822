"""Attention: what a token sees, by blocks and by rows, when no padding mask is needed, and the implementations."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import response
from helpers.tiny_models import attached, random_model, random_vision_model
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from transformers import (
    AutoModel,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Row
from popo_lightning.model import attention, attention_rows
from popo_lightning.model.attention import (
    PACKED,
    block_mask,
    check_attention,
    flat_mask,
    over_rows,
    use_packed_attention,
)
from popo_lightning.model.attention_rows import packed_rows, rectangles
from popo_lightning.model.packing import ignores_right_padding, shares_prompts, takes_packed_tokens
from popo_lightning.model.padded_rows import PaddedRows, pad_rows, pad_sequences
from popo_lightning.model.scoring import packed_mask, response_states
from popo_lightning.policy import PolicyModule

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
NARROW_VALUES: dict[str, Any] = {  # 32 numbers for a key, 24 for a value
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 2,
}
TEXT: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 with a window": Qwen2Config(**SMALL, **WINDOW),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3 of experts": Qwen3MoeConfig(**SMALL, **MOE, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=5),
    "gpt-neox": GPTNeoXConfig(**{name: value for name, value in SMALL.items() if name != "num_key_value_heads"}),
    "deepseek-v3": DeepseekV3Config(**SMALL | NARROW_VALUES),
}
OTHER: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2),
    "opt": OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2),
    "bloom": BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2),
    "gemma3 that sees forwards": Gemma3TextConfig(**SMALL, head_dim=16, use_bidirectional_attention=True),
}


def model_of(config: Any, implementation: str | None = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def drawn_rows(groups: int, seed: int = 0, longest: int = 12) -> list[list[Row]]:
    """Returns groups of rows that share a prompt, including responses without a token."""
    draw, rows, torch_draw = Random(seed), [], torch.Generator().manual_seed(seed)
    for group in range(groups):
        prompt = torch.randint(1, 40, (draw.randint(1, longest),), generator=torch_draw)
        lengths = [draw.choice((0, 1, draw.randint(1, longest))) for _ in range(draw.randint(1, 5))]
        answers = [Response(torch.randint(1, 40, (n,), generator=torch_draw), torch.zeros(n), "stop") for n in lengths]
        rows.append([Row(10 * group + i, prompt, each) for i, each in enumerate(answers)])
    return rows


def joined(groups: list[list[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


def states(model: Any, part: PaddedRows) -> Tensor:
    found: Tensor = response_states(model, part)
    return found


def by_row(model: Any, part: PaddedRows) -> dict[int, Tensor]:
    """Returns the states of each row's response tokens."""
    return dict(zip(part.index.tolist(), states(model, part).split(part.mask.sum(1).tolist()), strict=True))


# -- no padding mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_states_need_no_padding_mask(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = model_of(TEXT[kind], implementation), pad_rows(joined(drawn_rows(4)))
    assert ignores_right_padding(model) and not part.attention_mask.all()
    given: list[Any] = []
    model.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs.get("attention_mask")), with_kwargs=True)
    with torch.no_grad():
        without = states(model, part)
        monkeypatch.setattr("popo_lightning.model.scoring.ignores_right_padding", lambda model: False)
        masked = states(model, part)
    assert given[0] is None and given[1] is not None and not given[1].all()
    assert without.std() > 0.1
    # Padding with other states goes to other experts, whose batches are then rounded differently.
    assert float((without - masked).abs().max()) <= (1e-5 if "experts" in kind else 0.0)


@pytest.mark.parametrize("kind", OTHER)
def test_other_models_keep_their_padding_mask(kind: str) -> None:
    model, part = model_of(OTHER[kind]), pad_rows(joined(drawn_rows(4)))
    assert not ignores_right_padding(model) and not shares_prompts(model) and not takes_packed_tokens(model)
    given: list[Any] = []
    model.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs.get("attention_mask")), with_kwargs=True)
    states(model, part)
    assert torch.equal(given[0].bool(), part.attention_mask)


def test_images_keep_their_padding_mask(tmp_path: Path) -> None:
    from popo_lightning.model.loading import load_trainable

    model = load_trainable(random_vision_model(tmp_path), torch.float32, False)
    assert not ignores_right_padding(model.base_model)
    assert model.config._attn_implementation == "sdpa"


def test_a_plain_pass_takes_the_causal_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets no mask, and keys that several heads share are not copied."""
    calls: list[dict[str, Any]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        calls.append(others | {"heads": (query.shape[1], key.shape[1])})
        return kernel(query, key, value, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    states(model_of(TEXT["llama"]), pad_rows(joined(drawn_rows(3))))
    packed = model_of(TEXT["llama"])
    use_packed_attention(packed)
    states(packed, pad_rows(joined(drawn_rows(3))[:1]))  # a single row has no other rows to hide
    assert len(calls) == 4
    for call in calls:
        assert call["attn_mask"] is None and call["is_causal"] and call["enable_gqa"] and call["heads"] == (4, 2)


# -- what a token sees ---------------------------------------------------------------------------------------------


def flat(mask: Tensor, segments: Tensor) -> Tensor:
    """Returns (N, N) what the N tokens without padding see of each other, from (S, 1, L, L)."""
    texts, length = segments.shape
    seen = torch.zeros(texts, length, texts, length, dtype=torch.bool)
    for text in range(texts):
        seen[text, :, text] = mask[text, 0] == 0
    kept = (segments >= 0).flatten()
    return seen.view(texts * length, -1)[kept][:, kept]


@pytest.mark.parametrize("longest", [12, 90, 400])
@pytest.mark.parametrize("multiple", [1, 128])
def test_the_block_mask_is_the_dense_one(longest: int, multiple: int) -> None:
    for seed in range(4):
        segments = pad_sequences(drawn_rows(5, seed, longest)).segments
        assert segments is not None
        mask = block_mask(segments, multiple)
        expected = flat(packed_mask(segments, torch.float32), segments)
        tokens, filled = len(expected), mask.shape[-1]
        assert filled == -(-tokens // multiple) * multiple and mask.shape == (1, 1, filled, filled)
        places = torch.arange(filled)
        found = mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
        assert torch.equal(found[:tokens, :tokens], expected)
        assert not found[:tokens, tokens:].any() and not found[tokens:, :tokens].any()
        assert found.diagonal().all()
        # The blocks are those that torch finds by checking every pair.
        exact = flex.create_block_mask(mask.mask_mod, None, None, filled, filled, device="cpu")
        if multiple == 1:  # torch counts what follows the last token as hidden
            assert torch.equal(*(_blocks(each, "kv") | _blocks(each, "full_kv") for each in (mask, exact)))
        else:
            assert all(torch.equal(_blocks(mask, name), _blocks(exact, name)) for name in ("kv", "full_kv"))


def _blocks(mask: Any, name: str) -> Tensor:
    """Returns (Q, K) true where a block is listed."""
    counts, which = getattr(mask, f"{name}_num_blocks")[0, 0], getattr(mask, f"{name}_indices")[0, 0]
    listed = torch.zeros(which.shape, dtype=torch.bool)
    for query, (count, keys) in enumerate(zip(counts.tolist(), which, strict=True)):
        listed[query, keys[:count].long()] = True
    return listed


def test_each_device_has_its_own_way() -> None:
    segments = pad_sequences(drawn_rows(5)).segments
    assert segments is not None
    mask = flat_mask(segments)
    tokens = int((segments >= 0).sum())
    assert mask.rows is not None and mask.shape == (1, 1, tokens, tokens)
    assert block_mask(segments).rows is None


def test_a_long_pass_is_mostly_not_computed() -> None:
    rows = [Row(i, torch.ones(512, dtype=torch.long), response([1] * 512)) for i in range(31)]
    segments = pad_sequences([rows]).segments
    assert segments is not None and segments.shape == (1, 16384)
    mask = block_mask(segments)
    # A segment has 4 blocks: 10 in each triangle, and for every response the 16 of its prompt.
    assert int(_blocks(mask, "kv").sum() + _blocks(mask, "full_kv").sum()) == 32 * 10 + 31 * 16
    assert int(_blocks(mask, "full_kv").sum()) == 32 * 6 + 31 * 16


def test_rows_as_rectangles_by_hand() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, -1, -1, -1, -1]])
    prompts, responses = rectangles(segments)
    assert prompts.queries.tolist() == [[0, 1], [6, 0]] and prompts.keys.tolist() == [[0, 1], [6, 0]]
    assert responses.queries.tolist() == [[2, 3, 4], [5, 0, 0], [7, 0, 0]]
    assert responses.keys.tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 0, 0], [6, 0, 7, 0, 0]]
    assert responses.order.tolist() == [2, 3, 4, 5, -1, -1, 7, -1, -1] and responses.keys.shape[1] == 5
    seen = (responses.mask == 0).int()
    assert seen[0, 0].tolist() == seen[1, 0].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen[2, 0].tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    assert torch.isneginf(responses.mask[responses.mask != 0]).all()


def test_rectangles_are_padded_little(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = pad_sequences(drawn_rows(40, 1, 100)).segments
    assert segments is not None
    few = rectangles(segments)
    assert len(few) >= 2
    monkeypatch.setattr(attention_rows, "MIN_PAIRS", 0)
    many = rectangles(segments)
    entries = [sum(each.mask.numel() for each in found) for found in (few, many)]
    assert len(many) > len(few) and entries[1] < entries[0]
    for found in (few, many):
        places = torch.cat([each.order for each in found])
        assert sorted(places[places >= 0].tolist()) == list(range(int((segments >= 0).sum())))


# -- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt-neox", "qwen3 of experts", "deepseek-v3"])
@pytest.mark.parametrize("path", ["rows", "blocks"])
def test_states_are_those_of_the_dense_mask_and_of_each_row_alone(
    kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = model_of(TEXT[kind]), model_of(TEXT[kind])
    assert takes_packed_tokens(model)
    use_packed_attention(model)
    rows = drawn_rows(6, 3, 60)
    packed = pad_sequences(rows)
    if path == "blocks":
        monkeypatch.setattr("popo_lightning.model.scoring.flat_mask", lambda segments: block_mask(segments, 128))
    calls = []
    monkeypatch.setattr(attention, "over_rows", lambda *args: calls.append(1) or over_rows(*args))
    with torch.no_grad():
        found, dense = by_row(model, packed), by_row(plain, packed)
        assert len(calls) == (2 if path == "rows" else 0)
        for row in joined(rows):
            alone = states(plain, pad_rows([row]))
            torch.testing.assert_close(found[row.index], alone, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(found[row.index], dense[row.index], atol=2e-5, rtol=2e-5)
    assert torch.cat(list(found.values())).std() > 0.1


@pytest.mark.parametrize("path", ["rows", "blocks"])
def test_gradients_are_those_of_the_dense_mask(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, part = model_of(TEXT["llama"]), model_of(TEXT["llama"]), pad_sequences(drawn_rows(6, 3, 60))
    use_packed_attention(model)
    if path == "blocks":  # torch's reference for flex_attention, which is otherwise refused on a CPU
        monkeypatch.setattr("popo_lightning.model.scoring.flat_mask", block_mask)
        monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    for each in (plain, model):
        (states(each, part) * torch.linspace(-1, 1, 64)).square().sum().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None and expected.grad.norm() > 1e-3, name
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_bfloat16_is_rounded_once(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and their shares are float32, so the output is float64's, rounded once."""
    segments = pad_sequences(drawn_rows(6, 3, 60)).segments
    assert segments is not None
    draw, tokens = torch.Generator().manual_seed(0), int((segments >= 0).sum())
    inputs = [torch.randn(1, number, tokens, 16, generator=draw) for number in (heads[0], heads[1], heads[1])]

    types: list[torch.dtype] = []
    kernel = torch._C._nn.scaled_dot_product_attention

    def spy(query: Tensor, *others: Any, **named: Any) -> Tensor:
        out = kernel(query, *others, **named)
        types.append(out.dtype)
        return out

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)

    def found(dtype: torch.dtype) -> list[Tensor]:
        given = [each.to(torch.bfloat16).to(dtype).requires_grad_() for each in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = over_rows(*given, packed_rows(segments), 0.4)
        assert out.shape == (1, tokens, heads[0], 16) and out.dtype == dtype
        (out * torch.linspace(-1, 1, 16).to(torch.bfloat16).to(dtype)).sum().backward()
        return [out.detach().double(), *(each.grad.double() for each in given if each.grad is not None)]

    for mine, true in zip(found(torch.bfloat16), found(torch.float64), strict=True):
        assert true.norm() > 1 and 0 < (mine - true).norm() < 2**-8 * true.norm()
    assert set(types) == {torch.float32, torch.float64}


def test_other_masks_go_to_sdpa() -> None:
    """With transformers' own masks, and without a mask, it gives the same as sdpa."""
    model, plain = model_of(TEXT["qwen2"]), model_of(TEXT["qwen2"])
    use_packed_attention(model)
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    for given in (None, mask):
        found, expected = (each(input_ids=ids, attention_mask=given)[0] for each in (model, plain))
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0, 4:], expected[0, 4:])


# -- which implementation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "device", "message"),
    [
        ("flash_attention_2", "cuda", r"model\.attention is 'flash_attention_2', which needs the package flash_attn,"),
        ("flash_attention_3", "cuda", "needs the package flash_attn_interface"),
        ("kernels-community/none", "cuda", "needs the package kernels"),
        ("flash", "cuda", r"model\.attention is 'flash'; use sdpa, eager, flex_attention"),
        ("flash", "cpu", r"model\.attention is 'flash'; use sdpa, eager, flex_attention"),
        ("flex_attention", "cpu", r"model\.attention is 'flex_attention', which trains on CUDA only"),
        ("flash_attention_2", "cpu", "trains on CUDA only"),
    ],
)
def test_what_is_not_there_is_named(
    implementation: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=message):
        check_attention(implementation, torch.device(device), torch.bfloat16)
    for good in (None, "sdpa", "eager"):
        check_attention(good, torch.device(device), torch.bfloat16)
    check_attention("flex_attention", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(attention, "find_spec", lambda name: "found")
    check_attention("flash_attention_3", torch.device("cuda"), torch.bfloat16)


def test_flash_attention_takes_no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels refuse float32, but a run would notice only after its first rollouts."""
    monkeypatch.setattr(attention, "find_spec", lambda name: "found")
    cuda = torch.device("cuda")
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        with pytest.raises(SettingError, match=rf"model\.attention is '{name}', .* trainer\.precision bf16-mixed"):
            check_attention(name, cuda, torch.float32)
    for name in (None, "sdpa", "flex_attention"):
        check_attention(name, cuda, torch.float32)


def test_it_is_named_before_the_model_loads() -> None:
    with pytest.raises(SettingError, match=r"model\.attention is 'flex_attention'"):
        attached(PolicyModule(path="some/model", attention="flex_attention"))


def test_the_setting_decides(tmp_path: Path) -> None:
    folder = str(random_model("qwen2", tmp_path))
    for setting, used in ((None, PACKED), ("sdpa", "sdpa"), ("eager", "eager")):
        module = attached(PolicyModule(path=folder, attention=setting))
        assert module.model.config._attn_implementation == used and module._layer_costs is not None
        assert module._layer_costs.flat == (setting is None)
