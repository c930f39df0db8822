"""Metrics, each checked against a count by hand or by brute force."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.groups import group, response
from helpers.tiny_models import fit
from torch import Tensor

from popo_lightning.callbacks.monitor import Monitor
from popo_lightning.callbacks.samples import SampleTable
from popo_lightning.core.errors import EngineGapError, SettingError
from popo_lightning.core.groups import Group
from popo_lightning.core.markdown import markdown_table
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.metrics.estimates import AvgAtK, PassAtK, effective_sample_size
from popo_lightning.replay.composer import OnPolicy
from popo_lightning.rollout.report import RolloutReport, Totals, composer_metrics, of_all_ranks, rollout_metrics


def computed(metric: Any, *batches: Tensor) -> float:
    for batch in batches:
        metric.update(batch)
    return float(metric.compute())


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    n = 6
    for right in range(n + 1):
        samples = torch.tensor([[1.0] * right + [0.0] * (n - right)])
        for k in range(1, n + 1):
            subsets = list(combinations(samples[0].tolist(), k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert computed(PassAtK(k), samples) == pytest.approx(expected, abs=1e-7)
            assert computed(PassAtK(k), samples.flip(1)) == pytest.approx(expected, abs=1e-7)


def test_pass_at_k_averages_problems_not_batches() -> None:
    right = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])  # pass@2: 1/2, 5/6, 0
    for batches in ([right], [right[:1], right[1:]]):
        assert computed(PassAtK(2), *batches) == pytest.approx((1 / 2 + 5 / 6) / 3)
    assert computed(PassAtK(1), torch.tensor([[0.51, 0.5, 0.4, 0.0]])) == 0.25  # scores above 0.5 count as right


def test_avg_at_k_takes_the_first_k() -> None:
    right = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    for batches in ([right], [right[:1], right[1:]]):
        assert computed(AvgAtK(2), *batches) == pytest.approx((0.5 + 0 + 1) / 3)
        assert computed(AvgAtK(4), *batches) == pytest.approx((3 + 2 + 3) / 12)


@pytest.mark.parametrize("kind", [AvgAtK, PassAtK])
def test_too_few_samples_are_refused(kind: Any) -> None:
    for samples in (torch.ones(2, 3), torch.ones(4)):
        with pytest.raises(ValueError, match="at least 4"):
            kind(4).update(samples)
    with pytest.raises(SettingError, match="k is 0"):
        kind(0)


# -- an iteration's tokens -----------------------------------------------------------------------------------------


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(torch.ones(7)) == 1
    assert effective_sample_size(torch.full((5,), 0.01)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)
    assert effective_sample_size(torch.tensor([8.0, 0, 0, 0])) == pytest.approx(1 / 4)
    assert effective_sample_size(torch.tensor([1e30, 1e30])) == pytest.approx(1)  # the square of 1e30 overflows float32


def test_drift_between_engine_and_policy_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Monitor(gap_warning=0.01)._check_gap(0.01, exact=True)
        assert not caplog.records
        Monitor(gap_warning=0.01, gap_error=None)._check_gap(0.011, exact=True)
        assert "0.011 nats" in caplog.text
    with pytest.raises(EngineGapError, match=r"0\.3 nats"):
        Monitor(gap_error=0.2)._check_gap(0.3, exact=True)
    for settings in ({"gap_warning": 0.0}, {"gap_error": -1.0}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            Monitor(**settings)


# -- an iteration's rollouts ---------------------------------------------------------------------------------------


def made(id: int, version: int, *answers: Any) -> Group:
    return Group(id, group(id).problem, torch.tensor([1]), list(answers), version)


def reported() -> RolloutReport:
    """Reports four fresh groups: effective, all right, all wrong, and effective by score alone.

    Two of them and two replayed groups are trained on.
    """
    fresh = [
        made(0, 6, response((1, 2, 3), score=1.0), response((1,), score=0.0, finish_reason="length")),
        made(1, 6, response((1,), score=1.0), response((1,), score=1.0)),
        made(2, 6, response((1,) * 5, score=0.0, finish_reason="length"), response((1,), score=0.0, failure="timeout")),
        made(3, 6, response((1, 2), score=0.5, acc=0.0), response((1, 2), score=0.0)),
    ]
    report = RolloutReport(6, "score")
    report.sampled(fresh[:1])
    report.sampled(fresh[1:])
    report.composed([fresh[0], fresh[3], group(9, version=3), group(8, version=5)])
    return report


def test_rollout_metrics_by_hand() -> None:
    assert rollout_metrics(reported().counts()) == pytest.approx(
        {
            "reward/score": 3.5 / 8,
            "reward/acc": 3 / 8,
            "rollout/effective_share": 2 / 4,
            "rollout/all_wrong_share": 2 / 4,  # one of them has scores for format alone
            "rollout/truncated_frac": 2 / 8,
            "rollout/response_tokens": 16 / 8,
            "rollout/grading_failures": 1.0,
            "replay/groups": 2.0,
            "replay/share": 2 / 4,
            "replay/age_mean": 2.0,
            "replay/age_max": 3.0,
            "replay/trained_groups": 4.0,
        }
    )
    by_acc = reported()
    by_acc.effective_key = "acc"
    assert by_acc.counts()["effective_groups"] == 1


def test_rollout_metrics_of_two_ranks_are_those_of_all_their_groups() -> None:
    other, idle = RolloutReport(6, "score"), RolloutReport(6, "score")
    other.sampled([made(4, 6, response((1,), score=1.0), response((1, 2), score=0.0))])
    other.composed([*other.fresh, group(7, version=1)])
    both = rollout_metrics(of_all_ranks([reported().counts(), other.counts(), idle.counts()]))
    assert both["reward/score"] == pytest.approx(4.5 / 10) and both["rollout/response_tokens"] == pytest.approx(19 / 10)
    assert both["rollout/effective_share"] == pytest.approx(3 / 5) and both["replay/share"] == pytest.approx(3 / 6)
    assert both["replay/age_mean"] == pytest.approx(9 / 3) and both["replay/age_max"] == 5


def test_numbers_of_a_composer_over_two_ranks() -> None:
    """Counts add up. A mean is that of the ranks that have one."""
    first = {"replay/stored_prefixes": 3.0, "replay/restarted_groups": 2.0, "replay/restart_success": 0.5}
    first |= {"replay/left_out_responses": 1.0, "replay/baseline": math.nan, "pairs/margin": 0.2}
    second = {"replay/stored_prefixes": 4.0, "replay/restarted_groups": 0.0, "replay/left_out_responses": 5.0}
    second |= {"replay/baseline": 0.4, "pairs/margin": 0.4}
    assert composer_metrics([first, second]) == pytest.approx(
        {
            "replay/stored_prefixes": 7.0,
            "replay/restarted_groups": 2.0,
            "replay/restart_success": 0.5,
            "replay/left_out_responses": 6.0,
            "replay/baseline": 0.4,
            "pairs/margin": 0.3,
        }
    )
    assert composer_metrics([first]) == pytest.approx(first, nan_ok=True)
    assert composer_metrics([{}, {}]) == {}


class Reports(OnPolicy):
    def report(self) -> dict[str, float]:
        return {"replay/stored_groups": 3.0, "pairs/margin": 0.25}


def test_a_run_logs_those_of_all_ranks(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popo_lightning.data.all_gather_object", lambda own: [own, own])
    run = fit(policy, tmp_path, composer=Reports(), iterations=1)
    assert run.rows[0]["replay/stored_groups"] == 6 and run.rows[0]["pairs/margin"] == 0.25


def test_nothing_replayed_and_nothing_trained() -> None:
    report = reported()
    report.composed([])
    metrics = rollout_metrics(report.counts())
    assert metrics["replay/share"] == metrics["replay/groups"] == 0 and math.isnan(metrics["replay/age_mean"])


def test_totals_add_up_and_price_dynamic_sampling() -> None:
    totals = Totals()
    assert totals.dynamic_sampling_responses == math.inf
    for _ in range(2):
        totals.add(reported().counts())
    saved = asdict(totals)
    assert saved == {
        "responses": 16,
        "tokens": 32,
        "groups": 8,
        "effective_groups": 4,
        "replayed_groups": 4,
        "trained_groups": 8,
        "continued_responses": 0,
    }
    assert totals.dynamic_sampling_responses == 16 / (4 / 8)  # half of the groups are effective: twice the responses
    resumed = Totals(**saved)
    resumed.add(reported().counts())
    assert resumed.metrics() == {
        "total/responses": 24.0,
        "total/tokens": 48.0,
        "total/dynamic_sampling_responses": 48.0,
    }
    resumed.add(reported().counts() | {"responses": 12, "continued_responses": 4})  # the 4 are only for a critic
    assert resumed.responses == 36 and resumed.dynamic_sampling_responses == 32 / (8 / 16)
    del saved["continued_responses"]
    assert Totals(**saved) == totals


# -- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile",
    [
        "plain",
        "a | b || c",
        "`code` ``` fence",
        "two\n\nlines | x",
        "# head\r\rline\r\nline",
        "<script>alert(1)</script>",
        "[x](javascript:alert(1)) ![y](http://z)",
        "\\| \\\\| \\` \\",
        "| --- |\n| a | b |",
        "\x0b\x0c\x85\u2028\u2029x",
    ],
)
def test_hostile_text_stays_in_its_cell(hostile: str) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(markdown_table(["a", "b", "c"], [["1", hostile, "1"], ["2"] * 3]))
    body = shown[shown.index("<tbody>") :]
    assert body.count("<tr>") == 2 and body.count("<td>") == body.count("<td><code>") == 6
    assert shown.strip().endswith("</table>")
    assert not any(tag in shown for tag in ("<a ", "<img", "<script", "<h1"))


def test_samples_show_replayed_groups_first() -> None:
    groups = [group(i, version=4 if i % 2 else 6) for i in range(6)]
    batch = Minibatch(groups, version=6, index=0)
    table = SampleTable(groups=3)
    rows = table._rows(batch, table._chosen(batch), list(torch.arange(12.0)))
    assert [(row["problem"], row["advantage"], row["age"]) for row in rows] == [
        ("problem 1", 2.0, 2),
        ("problem 1", 3.0, 2),
        ("problem 4", 8.0, 0),
        ("problem 4", 9.0, 0),
        ("problem 2", 4.0, 0),
        ("problem 2", 5.0, 0),
    ]
    assert rows[0]["iteration"] == 7 and rows[0]["score"] == 0.0 and rows[1]["score"] == 1.0


def test_samples_are_written_when_due(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), loggers=[])
    module = SimpleNamespace(advantages=lambda batch: list(torch.tensor([0.0, 1.0])))
    for version, index in ((0, 0), (0, 1), (1, 0), (2, 0)):
        batch = Minibatch([group(0, version)], version, index)
        SampleTable(every_n_iterations=2).on_train_batch_end(trainer, module, {}, batch, 0)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4  # of versions 0 and 2, two responses each


def test_samples_are_written_when_no_group_is_trained_on(tmp_path: Path) -> None:
    dull = [group(i, 2, scores=(0.0, 0.0)) for i in range(6)]
    data = SimpleNamespace(report=SimpleNamespace(fresh=dull))
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), loggers=[], datamodule=data)
    table = SampleTable(every_n_iterations=1, groups=2)
    table.on_train_batch_end(trainer, SimpleNamespace(advantages=None), {}, Minibatch([], 2, 0), 0)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["score"], row["advantage"], row["age"]) for row in rows] == [
        ("problem 0", 0.0, None, 0),
        ("problem 0", 0.0, None, 0),
        ("problem 5", 0.0, None, 0),
        ("problem 5", 0.0, None, 0),
    ]
    for report in (None, SimpleNamespace(fresh=[])):  # a run resumed inside an iteration, and one that samples nothing
        trainer.datamodule.report = report
        table.on_train_batch_end(trainer, SimpleNamespace(advantages=None), {}, Minibatch([], 2, 0), 0)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4
