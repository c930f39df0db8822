"""The groups of an optimizer step, as padded rows in micro-batches."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers.groups import group, response

from popo_lightning.core.groups import Response
from popo_lightning.core.minibatch import Minibatch, Row
from popo_lightning.model.padded_rows import flat_tokens, pad_rows
from popo_lightning.objectives.inputs import MinibatchTokens


def row(index: int, prompt: list[int], tokens: list[int], age: int = 0, prox: bool = True) -> Row:
    logp = [-0.1 * token for token in tokens]
    tensors = {"advantages": torch.tensor(index + 0.5)}
    if prox:
        tensors["prox_logp"] = torch.tensor([-0.2 * token for token in tokens])
    return Row(index, torch.tensor(prompt), response(tokens, logp), age, tensors=tensors)


def test_padded_layout_by_hand() -> None:
    rows = pad_rows([row(4, [11, 12, 13], [1, 2]), row(2, [21], [3, 4, 5], age=3), row(0, [31, 32], [6])])
    assert rows.input_ids.tolist() == [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0], [31, 32, 6, 0, 0]]
    assert rows.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert rows.is_response.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
    assert rows.mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    torch.testing.assert_close(
        rows.columns["behave_logp"], torch.tensor([[-0.1, -0.2, 0], [-0.3, -0.4, -0.5], [-0.6, 0, 0]])
    )
    torch.testing.assert_close(rows.columns["prox_logp"], 2 * rows.columns["behave_logp"])
    assert rows.columns["advantages"].tolist() == [[4.5], [2.5], [0.5]]
    assert (rows.index.tolist(), rows.age.tolist()) == ([4, 2, 0], [0, 3, 0])
    assert rows.fresh.tolist() == [True, False, True]
    assert rows.mask.dtype == rows.attention_mask.dtype == rows.is_response.dtype == torch.bool
    assert "prox_logp" not in pad_rows([row(0, [1], [2], prox=False)]).columns


def test_rows_of_a_minibatch_know_their_group() -> None:
    minibatch = Minibatch([group(0, version=3), group(1, version=5)], version=5, index=1)
    rows = minibatch.rows(advantages=list(torch.tensor([0.125, 0.25, 0.5, 0.75])))
    assert [(r.index, r.tensors["advantages"], r.fresh, r.age) for r in rows] == [
        (0, 0.125, False, 2),
        (1, 0.25, False, 2),
        (2, 0.5, True, 0),
        (3, 0.75, True, 0),
    ]
    assert minibatch.tokens == 8 and all(set(r.tensors) == {"advantages"} for r in rows)
    minibatch.recorded["prox_logp"] = [torch.tensor([float(i), 0.0]) for i in range(4)]
    assert [r.tensors["prox_logp"][0] for r in minibatch.rows()] == [0, 1, 2, 3]


def test_a_response_of_another_version_has_an_age_of_its_own() -> None:
    mixed = group(0, version=5)
    mixed = replace(mixed, responses=[replace(mixed.responses[0], version=2), mixed.responses[1]], loss_weight=0.5)
    rows = Minibatch([mixed], version=5, index=0).rows()
    assert [(r.fresh, r.age, r.loss_weight) for r in rows] == [(False, 3, 0.5), (True, 0, 0.5)]
    assert pad_rows(rows).columns["loss_weight"].tolist() == [0.5, 0.5]


def test_advantages_per_token_are_padded_where_any_response_has_them() -> None:
    first, second = row(0, [1], [2, 3, 4]), row(1, [1], [5])
    first = replace(first, tensors=first.tensors | {"advantages": torch.tensor([1.0, -2.0, 3.0])})
    assert pad_rows([first, second]).columns["advantages"].tolist() == [[1.0, -2.0, 3.0], [1.5, 0.0, 0.0]]


@pytest.mark.parametrize("with_prox", [False, True])
def test_minibatch_survives_a_checkpoint(tmp_path: Path, with_prox: bool) -> None:
    images = {"pixel_values": torch.rand(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    seen = replace(group(8, version=3), images=images)
    seen = replace(seen, problem=replace(seen.problem, images=(b"\x89PNG\x00", "a/b.png")))
    minibatch = Minibatch([seen, group(9, version=5)], version=5, index=1)
    if with_prox:
        minibatch.recorded["prox_logp"] = [torch.tensor([-1e-7, -i]) for i in range(4)]
    torch.save(minibatch, tmp_path / "minibatch.pt")
    read = torch.load(tmp_path / "minibatch.pt", weights_only=True)
    assert (read.fresh, read.version, read.index) == ([False, True], 5, 1)
    assert [(g.id, g.version) for g in read.groups] == [(8, 3), (9, 5)]
    assert read.groups[0].problem == seen.problem
    old, new = (pad_rows(m.rows(advantages=list(torch.tensor([0.5, 1.5, 2.5, 3.5])))) for m in (minibatch, read))
    for name, value in images.items():  # two responses, so the prompt's image occurs twice
        torch.testing.assert_close(new.images[name], torch.cat([value, value]))
    assert set(old.columns) == {"behave_logp", "advantages", "loss_weight"} | ({"prox_logp"} if with_prox else set())
    read_tensors = vars(new) | new.columns
    for name, value in (vars(old) | old.columns).items():
        if name not in ("images", "columns"):
            assert (value is None and read_tensors[name] is None) or torch.equal(value, read_tensors[name]), name


def test_response_needs_one_log_prob_a_token() -> None:
    for tokens, logp in ((torch.zeros(3), torch.zeros(2)), (torch.zeros(1, 2), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="one behavior log-prob per token"):
            Response(tokens.long(), logp, "stop")


def test_a_new_quantity_reaches_the_loss_by_its_name_alone() -> None:
    """Recorded for every row, or computed before the step, it needs a field of ObjectiveInputs; an extra needs none."""
    minibatch = Minibatch([group(0, version=0)], version=0, index=0)
    minibatch.recorded["values"] = [torch.tensor([0.25, 0.5]), torch.tensor([0.75, 1.0])]
    minibatch.extra["teacher_logp"] = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])]
    rows = pad_rows(minibatch.rows(returns=[torch.tensor(2.0), torch.tensor(3.0)]))
    inputs = rows.inputs(torch.zeros(2, 2))
    assert inputs.values is not None and inputs.values.tolist() == [[0.25, 0.5], [0.75, 1.0]]
    assert inputs.returns is not None and inputs.returns.tolist() == [[2.0], [3.0]]
    assert {name: column.tolist() for name, column in inputs.extra.items()} == {
        "teacher_logp": [[-1.0, -2.0], [-3.0, -4.0]]
    }
    with pytest.raises(TypeError, match="nothing_of_the_kind"):
        pad_rows(minibatch.rows(nothing_of_the_kind=[torch.zeros(2)] * 2)).inputs(torch.zeros(2, 2))


def test_flat_tokens_are_those_of_the_rows() -> None:
    """Rows are uneven, with a center between behave and the policy. A minibatch without rows has no tokens."""
    first, second = row(0, [1], [2, 3, 4], prox=False), row(1, [1], [5], age=2, prox=False)
    rows = [
        replace(each, tensors=each.tensors | {"prox_alpha": torch.tensor(alpha)})
        for each, alpha in ((first, 0.0), (second, 0.5))
    ]
    logp, prox, behave, advantages, fresh = flat_tokens(rows, [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])])
    assert logp.tolist() == [-1.0, -2.0, -3.0, -4.0]
    torch.testing.assert_close(behave, torch.tensor([-0.2, -0.3, -0.4, -0.5]))
    torch.testing.assert_close(prox, torch.tensor([-0.2, -0.3, -0.4, -2.25]))
    assert advantages.tolist() == [0.5, 0.5, 0.5, 1.5] and fresh.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert [len(column) for column in flat_tokens([], [])] == [0] * len(fields(MinibatchTokens))
