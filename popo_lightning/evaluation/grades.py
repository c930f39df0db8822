"""Refuses a benchmark of which no response could be graded, since its numbers would mean nothing."""

from __future__ import annotations

from popo_lightning.core.ranks import all_gather_object
from popo_lightning.evaluation.evaluated_run import EvaluatedRun
from popo_lightning.evaluation.results import BenchmarkResult
from popo_lightning.grading.pool import check_grades


def check_evaluation_grades(result: BenchmarkResult, data: EvaluatedRun) -> None:
    """Stops all ranks if the verifier failed for every response to a benchmark.

    Args:
        result: Result of the benchmark over all ranks.
        data: Data module, which knows the first grading failure on this rank.

    Raises:
        SettingError: Every grading failed; the message has the reason.
    """
    responses = result.numbers["problems"] * (result.settings.samples + result.settings.greedy)
    failures = result.numbers["grading_failures"]
    if failures == responses:  # on all ranks or none, since the rest is a collective
        counts = {"responses": responses, "failures": failures}
        check_grades(counts, all_gather_object(data.first_grading_failure), f"to benchmark '{result.name}'")
