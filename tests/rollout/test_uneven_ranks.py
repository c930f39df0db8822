"""Rules that ask for log-probs a different number of times on different ranks, with sharded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from helpers.processes import on_two_ranks, trainer_of
from helpers.tiny_models import tiny_task

from popo_lightning.core.groups import Group
from popo_lightning.data import RolloutDataModule
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.policy import PolicyModule
from popo_lightning.proximal.snapshot import ProximalSnapshot
from popo_lightning.replay.composer import Composer, Iteration

ASKS = {0: (2, 0), 1: (3, 1), 2: (0, 0), 3: (0, 2)}  # number of questions of each rank, by iteration
SAMPLES = {0: (True, True), 1: (True, False), 2: (False, False), 3: (False, True)}


class Uneven(Composer):
    """Records the answers that its rank gets."""

    state = ("kept", "version", "gaps", "sampled_by")

    def __init__(self) -> None:
        self.kept: list[Group] = []
        self.version = 0
        self.gaps: list[list[float]] = []
        self.sampled_by: list[int] = []

    def samples_next(self) -> bool:
        return SAMPLES[self.version][dist.get_rank()]

    def compose(self, iteration: Iteration) -> list[Group]:
        if self.samples_next():
            self.kept = iteration.rollout()
            self.sampled_by.append(self.kept[0].version)
        gaps = []
        for place in range(ASKS[self.version][dist.get_rank()]):
            groups = self.kept[place:]  # the ranks' passes also have different sizes
            for group, present in zip(groups, iteration.logprobs(groups), strict=True):
                behave = torch.cat([response.behave_logp for response in group.responses])
                gaps.append(float((torch.cat(present) - behave).abs().max()))
        assert iteration.logprobs([]) == []
        self.gaps.append(gaps)
        self.version += 1
        return self.kept


def trained(policy: str, strategy: str) -> dict[str, Any]:
    module = PolicyModule(path=policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), micro_batch_tokens=40)
    composer = Uneven()
    settings: dict[str, Any] = {"problems_per_iteration": 8, "group_size": 4, "minibatches": 1}
    settings |= {"max_new_tokens": 8, "max_prompt_tokens": 16}
    data = RolloutDataModule(tiny_task(), TransformersEngine(), composer, **settings)
    trainer = trainer_of(strategy, 2, 1, [ProximalSnapshot()], max_epochs=len(ASKS))
    trainer.fit(module, data)
    weights = {name: weight.clone() for name, weight in module.named_weights()}
    found = {name: getattr(composer, name) for name in ("version", "gaps", "sampled_by")}
    return found | {"weights": weights, "steps": trainer.global_step}


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_ranks_may_ask_differently_often(policy: Path, tmp_path: Path, strategy: str) -> None:
    first, second = on_two_ranks(trained, tmp_path, str(policy), strategy, seconds=200)
    for rank, found in enumerate((first, second)):
        asked = [[4, 7, 9][counts[rank] - 1] if counts[rank] else 0 for counts in ASKS.values()]
        assert [len(gaps) for gaps in found["gaps"]] == asked and found["version"] == found["steps"] == 4
        fresh = [
            max(gaps) for gaps, samples in zip(found["gaps"], SAMPLES.values(), strict=True) if gaps and samples[rank]
        ]
        assert fresh and max(fresh) < 1e-4, "a rank gets the log-probs of its own groups"
    assert first["sampled_by"] == [0, 1] and second["sampled_by"] == [0, 3], "the newest weights, if one rank samples"
    assert max(second["gaps"][1]) > 1e-3, "what was sampled before is scored by weights that have moved"
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], atol=0, rtol=0)


class Compares(Composer):
    """Asks for the log-probs of two policies. Each rank has its own order."""

    needs_reference = True
    state = ("apart",)
    asks: ClassVar = {0: [("first", "present"), ("present", "first", "first")], 1: [("first",), ()]}

    def __init__(self) -> None:
        self.apart: list[float] = []

    def compose(self, iteration: Iteration) -> list[Group]:
        groups = iteration.rollout()
        for question in self.asks[iteration.version][dist.get_rank()]:
            found = iteration.logprobs(groups) if question == "present" else iteration.reference_logprobs(groups)
            behave = [torch.cat([response.behave_logp for response in group.responses]) for group in groups]
            gaps = [(torch.cat(logps) - own).abs().max() for logps, own in zip(found, behave, strict=True)]
            self.apart.append(float(max(gaps)))
        return groups


def compared(policy: str, strategy: str) -> list[float]:
    module = PolicyModule(path=policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), micro_batch_tokens=40)
    composer = Compares()
    settings: dict[str, Any] = {"problems_per_iteration": 8, "group_size": 4, "minibatches": 1}
    settings |= {"max_new_tokens": 8, "max_prompt_tokens": 16}
    data = RolloutDataModule(tiny_task(), TransformersEngine(), composer, **settings)
    trainer_of(strategy, 2, 1, [ProximalSnapshot()], max_epochs=2).fit(module, data)
    return composer.apart


def test_ranks_may_ask_for_two_policies_in_any_order(policy: Path, tmp_path: Path) -> None:
    first, second = on_two_ranks(compared, tmp_path, str(policy), "fsdp2", seconds=200)
    assert len(first) == 3 and len(second) == 3
    assert max(first[:2] + second) < 1e-4, "at the start both are the policy that sampled"
    assert first[2] > 1e-3, "the first policy stays what it was"
