"""Rows without advantage train as with a backward pass, but have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.objectives import random_rows, tokens_of
from helpers.processes import Steps, on_two_ranks, rows_of, train, whole_tensors
from helpers.tiny_models import attached, random_model
from torch import Tensor

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods.bapo_balanced import BalancedClip
from popo_lightning.methods.cispo import CISPO
from popo_lightning.methods.freshper import FilteredBehaveAligned
from popo_lightning.methods.gspo import GSPO
from popo_lightning.methods.m2po import M2PO
from popo_lightning.methods.opa_dpo import OPADPO
from popo_lightning.methods.pnpo import PNPO
from popo_lightning.methods.rapid import CappedImportance
from popo_lightning.methods.rec import REC
from popo_lightning.methods.remix import ConvexKL, ScaledWidth
from popo_lightning.methods.sat import SAT
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.aggregations import PairMean
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.inputs import ObjectiveInputs
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.regularizers import KL, EntropyBonus, Regularizer, SquaredLogRatio
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion, TrustRegionOutput, Unbounded
from popo_lightning.objectives.weights import NoCorrection
from popo_lightning.objectives.without_advantage import moves_by_advantage_alone
from popo_lightning.policy import PolicyModule
from popo_lightning.training.minibatch_loss import MinibatchLoss

# -- which objectives ----------------------------------------------------------------------------------------------

REGIONS: list[Callable[[], TrustRegion]] = [
    PPOClip,
    Unbounded,
    BalancedClip,
    ScaledWidth,
    BehaveAligned,
    FilteredBehaveAligned,
    M2PO,
    CISPO,
    CappedImportance,
    REC,
    GSPO,
    SAT,
    PNPO,
]


@pytest.mark.parametrize("make", REGIONS)
def test_the_trust_regions_move_by_advantage_alone(make: Callable[[], TrustRegion]) -> None:
    region = make()
    objective = Objective(NoCorrection(), region)
    if objective.needs_minibatch_tokens:
        objective = objective.for_minibatch(tokens_of(random_rows()))
    assert moves_by_advantage_alone(objective, 3)


def test_rows_that_are_no_part_of_a_pair_do_not_move_the_policy() -> None:
    region = OPADPO(reference="first", anchor=0.5, opa=0.5)
    assert moves_by_advantage_alone(Objective(NoCorrection(), region, aggregation=PairMean()), 3)


class Pulled(PPOClip):
    """A user's region, which pulls towards prox for any advantage."""

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> TrustRegionOutput:
        found = super().__call__(rows, weight)
        return found._replace(loss=found.loss + 0.1 * (rows.logp - rows.prox_logp).square())


class Later(EntropyBonus):
    """An entropy bonus that begins at the third policy."""

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        return super().__call__(rows, weight) * (rows.version >= 3)


class Taught(Regularizer):
    """A user's rule, which has nothing to do in rows without a teacher."""

    def __init__(self, ask: Callable[[Mapping[str, Tensor]], Tensor | None]) -> None:
        self.ask = ask

    def __call__(self, rows: ObjectiveInputs, weight: Tensor) -> Tensor:
        teacher = self.ask(rows.extra)
        return torch.zeros_like(rows.logp) if teacher is None else (rows.logp - teacher).square()


OTHERS = [
    Objective(regularizers=[Taught(lambda extra: extra["teacher_logp"])]),
    Objective(regularizers=[Taught(lambda extra: extra.get("teacher_logp"))]),
    Objective(regularizers=[Taught(lambda extra: extra["teacher_logp"] + 1 if "teacher_logp" in extra else None)]),
    Objective(regularizers=[Taught(lambda extra: extra["place"].squeeze(-1)[:, :1].long().float())]),  # it may raise
    Objective(regularizers=[KL(0.1)]),
    Objective(regularizers=[ConvexKL(0.1)]),
    Objective(regularizers=[SquaredLogRatio(0.1)]),
    Objective(regularizers=[EntropyBonus(0.1)]),
    Objective(regularizers=[EntropyBonus(0.0), KL(1e-9)]),
    Objective(NoCorrection(), Pulled()),
    Objective(regularizers=[Later(0.1)]),
]


@pytest.mark.parametrize("objective", OTHERS)
def test_whatever_else_moves_the_policy_is_found(objective: Objective) -> None:
    assert not moves_by_advantage_alone(objective, 3)


def test_a_regularizer_may_begin_later() -> None:
    assert moves_by_advantage_alone(Objective(regularizers=[Later(0.1)]), 2)


def test_an_objective_that_is_tried_is_left_as_it_was() -> None:
    objective = Objective(NoCorrection(), BalancedClip()).for_minibatch(tokens_of(random_rows()))
    before, state = objective.report(), torch.get_rng_state()
    with torch.no_grad():
        assert moves_by_advantage_alone(objective, 0)
    assert objective.report() == before and torch.equal(torch.get_rng_state(), state)


# -- training ------------------------------------------------------------------------------------------------------


def levelled(minibatch: Minibatch, *level: int) -> Minibatch:
    """Gives some groups equal rewards."""
    for place in level:
        for response in minibatch.groups[place].responses:
            response.parts["score"] = 0.3
    return minibatch


# All kinds of ranks: with and without rows, with and without rows that teach.
STEPS = [
    (levelled(rows_of(1, [2, 7, 1, 4]), 0, 3), rows_of(2, [4])),
    (levelled(rows_of(3, [3, 5, 8]), 0, 1, 2), levelled(rows_of(4, [2, 2, 9, 1, 5]), 1, 4)),
    (levelled(rows_of(5, [3, 1]), 0, 1), levelled(rows_of(8, [2]), 0)),  # no row of any rank teaches
    (levelled(rows_of(6, [3, 1]), 0, 1), Minibatch([], 2, 3)),
    (rows_of(7, [3]), levelled(rows_of(9, [6, 6, 6]), 1)),
]
TOGETHER = [(Minibatch(a.groups + b.groups, 2, a.index),) for a, b in STEPS]


def trained(folder: Path, strategy: str, silent: bool = True, **settings: Any) -> dict[str, Any]:
    """Returns the results of the steps. AdamW has momentum and decay, so a step without a gradient shows too."""
    module = PolicyModule(
        path=str(folder), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), micro_batch_tokens=20, **settings
    )
    patched: Any = module
    passes = {"backward": 0, "forward": 0}
    back, forward = module.manual_backward, module.forward

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            passes[kind] += 1
            return function(*arguments, **named)

        return call

    patched.manual_backward, patched.forward = counted("backward", back), counted("forward", forward)
    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        if not silent:
            patch.setattr("popo_lightning.training.minibatch_loss.moves_by_advantage_alone", lambda *_: False)
        module, _ = train(module, strategy, TOGETHER if strategy == "one" else STEPS, [steps])
    return {
        "gradients": steps.gradients,
        "outputs": steps.outputs,
        "weights": whole_tensors(module.named_parameters()),
        "passes": passes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama-tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def in_full(folder: Path) -> dict[str, Any]:
    """Trains with a backward pass of every row."""
    return trained(folder, "one", silent=False)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["gradients"]) == len(expected["gradients"]) == len(STEPS)
    for got, wanted in zip(found["gradients"], expected["gradients"], strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], atol=2e-6, rtol=0)
    for got, wanted in zip(found["outputs"], expected["outputs"], strict=True):
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5, abs=1e-9)
        assert got["stepped"] is wanted["stepped"] is True


def test_training_is_the_same_with_fewer_backward_passes(folder: Path, in_full: dict[str, Any]) -> None:
    norms = [each["grad_norm"] for each in in_full["outputs"]]
    assert norms[2] == norms[3] == 0 and min(norms[0], norms[1], norms[4]) > 0.5
    found = trained(folder, "one")
    assert_equal(found, in_full)
    for got, wanted in zip(found["outputs"], in_full["outputs"], strict=True):
        assert got["mean_loss"] == pytest.approx(wanted["mean_loss"], abs=1e-6)
    assert in_full["passes"]["backward"] == in_full["passes"]["forward"]
    assert found["passes"]["backward"] < 0.75 * in_full["passes"]["backward"]


def test_a_regularizer_of_all_tokens_keeps_every_backward_pass(folder: Path) -> None:
    found = trained(folder, "one", regularizers=[EntropyBonus(0.1)])
    assert found["passes"]["backward"] == found["passes"]["forward"]


def test_the_proximal_pass_is_split_as_the_step_is(folder: Path) -> None:
    """Otherwise the ratio of an unmoved policy would not be exactly 1."""
    module = attached(PolicyModule(path=str(folder), micro_batch_tokens=20))
    minibatch = TOGETHER[0][0]
    rows = minibatch.rows(advantages=module.advantages(minibatch))
    parts = [module._passes(minibatch, each) for each in (minibatch.rows(), rows)]
    asked, stepped = ([part.index.tolist() for part in split] for split in parts)
    assert asked == stepped and sorted(index for part in asked for index in part) == list(range(len(rows)))
    silent = [not part.columns["advantages"].any() for part in parts[1]]
    assert 0 < sum(silent) < len(silent)


def both_ways(folder: Path) -> list[dict[str, Any]]:
    return [trained(folder, "ddp"), trained(folder, "fsdp2")]


@pytest.mark.slow
def test_two_ranks_train_as_one_process(folder: Path, in_full: dict[str, Any], tmp_path: Path) -> None:
    ranks = on_two_ranks(both_ways, tmp_path, folder, seconds=300)
    for ddp, fsdp2 in ranks:
        assert_equal(ddp, in_full)
        assert_equal(fsdp2, in_full)
    assert ranks[0][1]["passes"] == ranks[1][1]["passes"], "a pass of one rank waits for one of the other"
    for way in (0, 1):
        assert sum(rank[way]["passes"]["backward"] for rank in ranks) < in_full["passes"]["backward"]


@pytest.mark.parametrize(("critic", "silent"), [(None, True), (object(), False)])
def test_a_critic_learns_from_every_row(critic: Any, silent: bool) -> None:
    minibatch = levelled(rows_of(1, [2]), 0)
    losses = MinibatchLoss(Objective(), critic, minibatch, 1.0, 1.0)
    rows = pad_rows(minibatch.rows(advantages=[torch.zeros(())] * 3))
    assert losses.is_silent(rows) is silent
    taught = pad_rows(minibatch.rows(advantages=[torch.tensor(each) for each in (0.0, 0.0, -1e-6)]))
    assert not losses.is_silent(taught)
