"""Alarms when an engine keeps old weights, because unchanged weights are sent or new ones are not taken (verl#7495)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.groups import group
from helpers.tiny_models import fit, method, popo
from torch import Tensor

from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.core.errors import EngineGapError
from popo_lightning.engines.base import NamedTensors
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.model.lora import Lora
from popo_lightning.policy import PolicyModule
from popo_lightning.rollout.weight_alarms import Delivery, Probe

LORA = {"model": {"lora": Lora(r=2, alpha=4)}}
QUIET: dict[str, Any] = {"monitor": Monitor(gap_error=None), "lr": 1e-3, "iterations": 6}


class Late(TransformersEngine):
    """Takes only the first weights. `reads` decides whether it reads later ones."""

    reads = True

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        if version < 1:
            super().update_weights(weights, version)
        elif self.reads:
            assert list(weights)
        self.version = version


class Unread(Late):
    reads = False


@pytest.fixture
def sends_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always gives the engine the folder's weights, as if adapters were omitted."""
    usual, kept = PolicyModule.named_weights, dict[str, Tensor]()

    def first(self: Any, given: Any = None) -> Iterator[tuple[str, Tensor]]:
        if not kept:
            kept.update({name: weight.clone() for name, weight in usual(self, given)})
        return iter(kept.items())

    monkeypatch.setattr(PolicyModule, "named_weights", first)


@pytest.mark.parametrize("settings", [LORA, {}])
def test_weights_that_are_sent_unchanged_end_a_run(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, sends_first_weights: None, settings: dict[str, Any]
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(EngineGapError, match=r"not changed by a bit.*3 syncs in a row"),
    ):
        fit(policy, tmp_path, **settings, **QUIET)
    assert caplog.text.count("have not changed by a bit") == 2, "said twice before the end"


@pytest.mark.parametrize(
    ("limit", "said"),
    [("null", "not changed by a bit"), ("0.001", r"disagree by .* nats a token .*gap_error is 0\.001")],
)
def test_the_command_ends_with_one_sentence_and_exit_code_1(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sends_first_weights: None, limit: str, said: str
) -> None:
    lengths = ["--trainer.max_epochs", "6", "--run.folder", tmp_path, "--checkpoint.save_top_k", "0"]
    with pytest.raises(SystemExit) as ended:
        popo("fit", "--config", config, *method("grpo"), *lengths, "--monitor.gap_error", limit)
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in printed
    assert re.search(f"^popo: .*{said}", printed, re.MULTILINE)


@pytest.mark.parametrize("engine", [Late, Unread])
@pytest.mark.parametrize("settings", [LORA, {}])
def test_an_engine_that_ignores_weights_ends_a_run(
    policy: Path, tmp_path: Path, engine: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(EngineGapError, match="those of the first policy, bit for bit, 3 syncs in a row"):
        fit(policy, tmp_path, engine=engine(), **settings, **QUIET)


@pytest.mark.parametrize("settings", [LORA | {"lr": 0.0}, {"lr": 0.0}, LORA, {}])
def test_a_good_run_and_one_that_stands_still_are_left_alone(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        run = fit(policy, tmp_path, **(QUIET | {"iterations": 5} | settings))
    assert "syncs in a row" not in caplog.text and "in a row)" not in caplog.text and len(run.rows) == 5
    assert run.data.weight_sync.probe is not None and run.data.weight_sync.probe.done == (settings.get("lr") != 0.0)


def deliver(delivery: Delivery, weight: float, source: str | None) -> None:
    list(delivery.watched([("a", torch.full((3,), weight))]))
    delivery.judge(source)


def test_only_moved_weights_are_expected_to_differ(caplog: pytest.LogCaptureFixture) -> None:
    delivery = Delivery()
    for weight, source in ((1.0, "x"), (1.0, "x"), (2.0, "y"), (1.0, "x"), (1.0, None), (1.0, "z")):
        deliver(delivery, weight, source)
    assert not caplog.records
    deliver(delivery, 1.0, "new")
    assert len(caplog.records) == 1
    deliver(delivery, 3.0, "newer")  # a delivery that ends the sequence
    for source in ("a", "b"):
        deliver(delivery, 3.0, source)
    with pytest.raises(EngineGapError, match="3 syncs in a row"):
        deliver(delivery, 3.0, "c")


def test_an_engine_that_reads_a_part_is_not_judged() -> None:
    delivery = Delivery()
    for source in ("x", "y", "z", "a", "b"):
        next(delivery.watched([("a", torch.zeros(1)), ("b", torch.zeros(1))]))
        delivery.judge(source)
    assert delivery.digest is None and delivery.identity == "b"


def test_a_probe_asks_until_an_answer_differs() -> None:
    asked: list[int] = []
    answers = [[group(0)], [group(0)], [group(0, scores=(0.0, 1.0))]]
    answers[2][0].responses[1] = replace(answers[2][0].responses[1], behave_logp=torch.tensor([-0.5, -0.5 + 1e-7]))

    def ask() -> Any:
        asked.append(1)
        return answers[len(asked) - 1]

    probe = Probe(ask)
    for identity, times in (("x", 1), ("x", 1), (None, 1), ("y", 2), ("z", 3), ("a", 3)):
        probe.after(identity)
        assert len(asked) == times
    assert probe.done
