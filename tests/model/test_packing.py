"""Which rows share a pass and a prompt: what is refused, what it costs, and what the budgets allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.groups import response
from helpers.tiny_models import random_vision_model
from transformers import AutoModel, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from popo_lightning.core.minibatch import Row
from popo_lightning.model import packing
from popo_lightning.model.attention import PACKED
from popo_lightning.model.loading import load_model
from popo_lightning.model.packing import LayerCosts, micro_batches, shares_prompts
from popo_lightning.model.padded_rows import pad_sequences
from popo_lightning.model.scoring import packed_mask

CHEAP_ATTENTION = LayerCosts(1000.0, 1e-6, 1e-6)


def rows_of(*groups: tuple[int, tuple[int, ...]]) -> list[Row]:
    """Returns a row for each response. Groups are (prompt tokens, response tokens of each), with their own prompts."""
    rows: list[Row] = []
    for prompt, lengths in groups:
        ids = torch.full((prompt,), 100 + len(rows))
        rows += [Row(len(rows) + i, ids, response([i] * length)) for i, length in enumerate(lengths)]
    return rows


def tokens(sequence: list[Row]) -> int:
    return len(sequence[0].prompt_ids) + sum(len(row.response.token_ids) for row in sequence)


def indices(passes: list[list[list[Row]]]) -> list[list[list[int]]]:
    return [[[row.index for row in sequence] for sequence in each] for each in passes]


def cost_of(passes: list[list[list[Row]]], costs: LayerCosts) -> float:
    return sum(len(e) * costs.of(max(map(tokens, e)), any(len(sequence) > 1 for sequence in e)) for e in passes)


# -- the layout ----------------------------------------------------------------------------------------------------


def test_packed_layout_by_hand() -> None:
    def row(index: int, prompt: list[int], tokens: list[int]) -> Row:
        return Row(
            index,
            torch.tensor(prompt),
            response(tokens, [-0.1 * t for t in tokens]),
            tensors={"advantages": torch.tensor(index + 0.5)},
        )

    packed = [row(4, [11, 12], [1, 2]), row(1, [11, 12], [3]), row(3, [11, 12], [])], [row(0, [21], [4, 5, 6])]
    rows = pad_sequences(packed)
    assert rows.segments is not None and rows.positions is not None
    assert rows.input_ids.tolist() == [[11, 12, 1, 2, 3], [21, 4, 5, 6, 0]]
    assert rows.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, -1]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert rows.is_response.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert rows.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert rows.source.tolist() == [1, 2, 1, 5, 6, 7]  # the first prompt's end chooses two first tokens
    assert rows.index.tolist() == [4, 1, 3, 0] and rows.columns["advantages"].tolist() == [[4.5], [1.5], [3.5], [0.5]]
    assert rows.mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    torch.testing.assert_close(rows.columns["behave_logp"][rows.mask], -0.1 * rows.input_ids[rows.is_response].float())
    alone = pad_sequences([[each] for sequence in packed for each in sequence])
    assert alone.segments is None and alone.positions is None  # the input of an ordinary model
    assert alone.source.tolist() == [1, 2, 5, 12, 13, 14]


def test_mask_by_hand() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, 6, 6)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # the second response does not see the first
        [1, 1, 0, 0, 0, 1],
    ]
    assert torch.isneginf(mask[mask != 0]).all()


# -- how rows are split --------------------------------------------------------------------------------------------


def test_without_sharing_rows_keep_to_the_budget() -> None:
    lengths = [5, 9, 2, 7, 7, 30, 3, 1]
    rows = rows_of(*((length - 1, (1,)) for length in lengths))
    for budget in (1, 8, 14, 20, 29, 1000):
        parts = micro_batches(rows, budget)
        assert sorted(row.index for part in parts for (row,) in part) == list(range(8))
        for part in parts:
            assert len(part) == 1 or len(part) * max(map(tokens, part)) <= budget
    split = micro_batches(rows, 20)
    assert [[tokens(sequence) for sequence in part] for part in split] == [[30], [9, 7], [7, 5], [3, 2, 1]]
    assert len(micro_batches(rows, 8 * 30)) == 1
    assert len(micro_batches(rows, 8 * 30 - 1)) == 2
    assert micro_batches([], 10) == [] == micro_batches([], 10, CHEAP_ATTENTION)


def random_rows(seed: int) -> list[Row]:
    draw = Random(seed)
    groups = [
        (draw.randint(1, 30), tuple(draw.choice((0, 1, draw.randint(1, 40))) for _ in range(draw.randint(1, 9))))
        for _ in range(draw.randint(1, 7))
    ]
    return rows_of(*groups)


@pytest.mark.parametrize("costs", [CHEAP_ATTENTION, LayerCosts(100.0, 1.0, 1.0), LayerCosts(10.0, 1.0, 1.0)])
def test_every_row_once_behind_its_own_prompt_within_the_budget(costs: LayerCosts) -> None:
    for seed in range(20):
        rows = random_rows(seed)
        for budget in (1, 40, 100, 400, 10_000):
            parts = micro_batches(rows, budget, costs)
            sequences = [sequence for part in parts for sequence in part]
            assert sorted(row.index for sequence in sequences for row in sequence) == list(range(len(rows)))
            assert all(len({tuple(row.prompt_ids.tolist()) for row in sequence}) == 1 for sequence in sequences)
            for part in parts:
                longest = max(map(tokens, part))
                assert tokens(part[0]) == longest
                assert len(part) * longest <= budget or (len(part) == 1 and len(part[0]) == 1)
            assert cost_of(parts, costs) <= cost_of(micro_batches(rows, budget), costs)


def test_the_split_is_of_lengths_and_prompts_alone() -> None:
    rows = random_rows(3)
    tensors = {"advantages": torch.ones(4), "prox_logp": torch.zeros(4)}
    other = [replace(row, tensors=tensors, age=2) for row in rows]
    first, second = (indices(micro_batches(each, 150, LayerCosts(100.0, 1.0, 1.0))) for each in (rows, other))
    assert first == second
    assert max(len(sequence) for part in first for sequence in part) > 1


def test_short_responses_share_a_prompt_and_long_ones_do_not() -> None:
    """For 8 responses of T tokens to 100, m after one prompt cost (l (100 + m T) + (100 + m T)^2) / m each."""
    costs = LayerCosts(1000.0, 1.0, 1.0)

    def behind_one(length: int) -> int:
        return max(len(s) for part in micro_batches(rows_of((100, (length,) * 8)), 10**6, costs) for s in part)

    # The cost is lowest at m = sqrt(100 (1000 + 100)) / T = 332 / T.
    assert [behind_one(length) for length in (10, 80, 160, 330, 1000)] == [8, 4, 2, 1, 1]


def test_responses_are_dealt_evenly_and_leave_no_sequence_empty() -> None:
    def dealt(lengths: tuple[int, ...], count: int) -> list[list[int]]:
        return [[len(r.response.token_ids) for r in each] for each in packing._dealt(rows_of((3, lengths)), count)]

    assert dealt((2, 7, 4, 5), 2) == [[7, 2], [5, 4]]
    assert dealt((2, 7, 4, 5), 3) == [[7], [5], [4, 2]]
    assert dealt((0, 0, 5), 3) == [[5], [0], [0]]
    assert dealt((0, 0, 0), 2) == [[0, 0], [0]]


def test_groups_with_one_prompt_share_it_and_images_never_do() -> None:
    rows = rows_of((5, (2, 3)), (5, (4,)))
    twice = [replace(row, prompt_ids=rows[0].prompt_ids.clone()) for row in rows]
    assert indices(micro_batches(twice, 1000, CHEAP_ATTENTION)) == [[[2, 1, 0]]]
    seen = [replace(row, images={"pixel_values": torch.zeros(1)}) for row in twice]
    assert indices(micro_batches(seen, 1000, CHEAP_ATTENTION)) == [[[2], [1], [0]]]


def test_the_mask_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(*[(10, (10, 10, 10))] * 4, (60, (1,)))
    monkeypatch.setattr(packing, "MASK_ENTRIES", 40 * 40 * 2 + 1)
    parts = micro_batches(rows, 10_000, CHEAP_ATTENTION)
    assert [[tokens(sequence) for sequence in part] for part in parts] == [[61], [40, 40], [40, 40]]
    monkeypatch.setattr(packing, "MASK_ENTRIES", 39 * 39)  # no prompt with three responses fits
    parts = micro_batches(rows, 10_000, CHEAP_ATTENTION)
    assert max(tokens(sequence) for part in parts for sequence in part if len(sequence) > 1) == 30
    for part in parts:
        masked = any(len(sequence) > 1 for sequence in part)
        assert not masked or len(part) * tokens(part[0]) ** 2 <= 39 * 39


def test_a_layers_costs_by_hand() -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20)
    # q and o are 8 x 8, k and v 8 x 4, and three matrices 8 x 20.
    for device, of in packing.PAIR_WEIGHTS.items():
        found = LayerCosts.of_model(config, device)
        assert found == LayerCosts(2 * (64 + 64 + 32 + 32 + 480), 4 * 8 * of.causal, 4 * 8 * of.masked)
    assert packing.PAIR_WEIGHTS["cpu"] != packing.PAIR_WEIGHTS["cuda"]
    assert LayerCosts(10.0, 2.0, 3.0).of(3, False) == 3 * 10 + 9 * 2
    assert LayerCosts(10.0, 2.0, 3.0).of(3, True) == 3 * 10 + 9 * 3
    weight = packing.PAIR_WEIGHTS["cpu"].masked
    wide = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=4, intermediate_size=20, head_dim=6)
    found = LayerCosts.of_model(wide)
    assert (found.linear, found.masked) == (2 * 8 * (4 * 24 + 60), 4 * 24 * weight) and not found.flat
    wide._attn_implementation_internal = PACKED
    assert LayerCosts.of_model(wide).flat


def test_a_mask_must_be_worth_more_than_what_it_hides() -> None:
    """Two responses after one prompt save 100 of 300 tokens, but attention covers 4/3 of the pairs, with a mask."""
    rows = rows_of((100, (50, 50)))
    dear, cheap = LayerCosts(100.0, 1.0, 2.0), LayerCosts(100.0, 1.0, 1.0)
    assert 2 * dear.of(150, False) < dear.of(200, True) and 2 * cheap.of(150, False) > cheap.of(200, True)
    assert indices(micro_batches(rows, 1000, dear)) == [[[0], [1]]]
    assert indices(micro_batches(rows, 1000, cheap)) == [[[0, 1]]]


# -- without padding -----------------------------------------------------------------------------------------------

FLAT = LayerCosts(1.0, 1e9, 1e9, flat=True)  # attention without extra cost, whatever its other costs


def test_without_padding_all_responses_are_behind_one_prompt() -> None:
    rows = rows_of((100, (50, 1, 700)), (3, (2, 2)))
    assert indices(micro_batches(rows, 10_000, FLAT)) == [[[2, 0, 1], [3, 4]]]
    assert indices(micro_batches(rows, 851, FLAT)) == [[[2, 0, 1]], [[3, 4]]]
    assert indices(micro_batches(rows, 850, FLAT)) == [[[2]], [[0, 1], [3, 4]]]  # 851 tokens are too many


def test_without_padding_the_budget_is_of_tokens() -> None:
    for seed in range(20):
        rows = random_rows(seed)
        for budget in (1, 40, 100, 400, 10_000):
            parts = micro_batches(rows, budget, FLAT)
            sequences = [sequence for part in parts for sequence in part]
            assert sorted(row.index for sequence in sequences for row in sequence) == list(range(len(rows)))
            assert all(len({tuple(row.prompt_ids.tolist()) for row in sequence}) == 1 for sequence in sequences)
            for part in parts:
                assert sum(map(tokens, part)) <= budget or (len(part) == 1 and len(part[0]) == 1)
    rows = rows_of((10, (10,)), (10, (90,)))
    assert len(micro_batches(rows, 120, FLAT)) == 1  # 2 x 100 with padding
    assert len(micro_batches(rows, 119, FLAT)) == 2


# -- which models share --------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "attention", "shares"),
    [
        (LlamaConfig(**SMALL), "sdpa", True),
        (LlamaConfig(**SMALL), "eager", True),
        (LlamaConfig(**SMALL, rope_parameters=YARN), "sdpa", True),
        (LlamaConfig(**SMALL, rope_parameters=DYNAMIC), "sdpa", False),
        (Qwen2Config(**SMALL), "sdpa", True),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1), "sdpa", False),
        (Qwen2Config(**SMALL, layer_types=["full_attention", "linear_attention"]), "sdpa", False),
        (MistralConfig(**SMALL, sliding_window=None), "sdpa", True),
        (MistralConfig(**SMALL), "sdpa", False),  # a window of 4096 in every layer, and no layer types
        (GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2), "sdpa", False),
    ],
)
def test_what_shares_prompts(config: Any, attention: str, shares: bool) -> None:
    model = AutoModel.from_config(config, attn_implementation=attention)
    assert shares_prompts(model) is shares


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels/any"])
def test_attention_that_takes_no_mask_shares_none(attention: str) -> None:
    model = AutoModel.from_config(LlamaConfig(**SMALL))
    assert shares_prompts(model)
    model.config._attn_implementation_internal = attention  # as chosen at run time
    assert model.config._attn_implementation == attention and not shares_prompts(model)


def test_positions_that_are_not_asked_for_share_none() -> None:
    class OwnPositions(torch.nn.Module):
        config: Any = None

        def forward(self, input_ids: Any, attention_mask: Any, **others: Any) -> None: ...

    model = OwnPositions()
    model.config = AutoModel.from_config(LlamaConfig(**SMALL)).config
    assert not shares_prompts(model)


def test_a_model_that_sees_images_shares_none(tmp_path: Path) -> None:
    assert not shares_prompts(load_model(random_vision_model(tmp_path), torch.float32).base_model)
