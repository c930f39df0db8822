"""Identities that must hold exactly for any numbers, in real trainings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import InFloat64, Run, attached, fit, method, metrics, popo, slots, weights_of
from model.test_policy import train
from torch import Tensor
from transformers import AutoModelForCausalLM

from popo_lightning.core.groups import Group
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.methods import m2po
from popo_lightning.methods.bapo_balanced import BalancedClip
from popo_lightning.methods.cispo import CISPO
from popo_lightning.methods.m2po import M2PO
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.methods.rapid import CappedImportance
from popo_lightning.methods.rec import REC
from popo_lightning.objectives.behave_clip import BehaveAligned
from popo_lightning.objectives.objective import Objective
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion, Unbounded
from popo_lightning.objectives.weights import NoCorrection, TruncatedIS
from popo_lightning.proximal.snapshot import ProximalPolicy, ProximalSnapshot
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Filter, OnPolicy


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def farthest_apart(pairs: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> float:
    """Returns the largest difference of a minibatch's two gradients, relative to its largest entry.

    A minibatch whose rows are all clipped has almost no gradient, only rounding, so its differences are in units of
    0.001. The processor decides how many minibatches of a training are such. At least one must not be.
    """
    apart, scales = [], []
    for gradient, other in pairs:
        scales.append(max(float(g.abs().max()) for g in gradient.values()))
        apart.append(farthest(gradient, other) / max(scales[-1], 1e-3))
        assert gradient.keys() == other.keys()
    assert max(scales) > 1e-3
    return max(apart)


def test_no_learning_no_ratio(policy: Path, tmp_path: Path) -> None:
    run = fit(policy, tmp_path, lr=0.0, iterations=4)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    for row in run.rows:
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
        assert row["policy/clip_frac"] == 0
        assert row["engine/logp_gap_max"] < 1e-4
        if row["replay/groups"]:
            # The weights have not moved, so a replayed token's weight differs from 1 only by the engine's rounding.
            assert row["weight/replayed_mean"] == pytest.approx(1, abs=1e-4)
            assert row["weight/replayed_max"] == pytest.approx(1, abs=1e-4)
            assert row["weight/replayed_ess"] == pytest.approx(1, abs=1e-6)
    start = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    assert same(weights_of(start), weights_of(run.module.model))


def test_popo_without_replay_is_grpo(config: Path, tmp_path: Path) -> None:
    """They agree bit for bit on the command line, because the behavior weight is exactly 1 on fresh rows."""
    common = ["fit", "--config", config, "--trainer.max_epochs", "3", "--evaluation.every_n_iterations", "0"]
    on_policy = ["--data.composer", "popo_lightning.replay.composer.OnPolicy"]
    popo_run = popo(*common, *method("popo"), *on_policy, "--run.folder", tmp_path / "popo")
    grpo_run = popo(*common, *method("grpo"), "--run.folder", tmp_path / "grpo")
    assert metrics(tmp_path / "popo") == metrics(tmp_path / "grpo")
    assert len(metrics(tmp_path / "grpo")) == 5  # three iterations, two evaluations
    assert same(weights_of(popo_run.model), weights_of(grpo_run.model))


class NeverFills(GroupReplayBuffer):
    def newest_first(self, *args: Any, **kwargs: Any) -> Iterator[Group]:
        return iter(())


def test_popo_with_an_empty_buffer_is_filter(policy: Path, tmp_path: Path) -> None:
    replay = fit(policy, tmp_path / "popo", composer=PrioritizedGroupReplay(NeverFills(8)))
    filtered = fit(policy, tmp_path / "filter", composer=Filter())
    assert replay.rows == filtered.rows
    assert same(replay.weights, filtered.weights)


class ProximalIsBehave(ProximalPolicy):
    """Centers the trust region on the policy that sampled, as in PPO before proximal and behave were separated."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.recorded["prox_logp"] = [response.behave_logp for response in batch.responses]


def test_proximal_is_behave_is_plain_ppo(policy: Path, tmp_path: Path) -> None:
    watch = Watch()
    runs = [
        fit(
            policy,
            tmp_path / str(number),
            objective=Objective(weight),
            proximal=ProximalIsBehave(),
            callbacks=[watch] if isinstance(weight, NoCorrection) else [],
            max_grad_norm=None,
            lr=3e-3,
        )
        for number, weight in enumerate((NoCorrection(), TruncatedIS(correct_fresh=True), TruncatedIS()))
    ]
    for run in runs[1:]:
        assert run.rows == runs[0].rows
        assert same(run.weights, runs[0].weights)
    assert sum(row["replay/groups"] for row in runs[0].rows) > 0
    assert max(row["policy/clip_frac"] for row in runs[0].rows) > 0
    # Compares with PPO written out, with the ratio to the sampling policy.
    assert farthest_apart((seen.gradient, by_hand(policy, seen, plain_ppo=True)) for seen in watch.seen) < 1e-4


def test_one_differs_from_decoupled_once_weights_moved(policy: Path, tmp_path: Path) -> None:
    runs = [
        fit(policy, tmp_path / type(weight).__name__, objective=Objective(weight), lr=3e-3, iterations=4)
        for weight in (TruncatedIS(), NoCorrection())
    ]
    replays = [row["replay/groups"] > 0 for row in runs[0].rows]
    first = replays.index(True)
    assert runs[0].rows[:first] == runs[1].rows[:first]  # nothing is replayed, so no weight matters
    decoupled, one = runs[0].rows[first], runs[1].rows[first]
    assert decoupled["weight/replayed_ess"] < 0.999
    assert decoupled["reward/score"] == one["reward/score"]  # the same rollouts
    assert decoupled["train/loss"] != one["train/loss"]
    assert farthest(runs[0].weights, runs[1].weights) > 1e-5


def test_micro_batches_do_not_change_the_step(policy: Path, tmp_path: Path) -> None:
    """Uses plain gradient descent. Adam's first step is the gradient's sign, even if that is a rounding error."""
    settings: dict[str, Any] = {"iterations": 1, "lr": 0.1, "optimizer": torch.optim.SGD, "minibatches": 1}
    whole = fit(policy, tmp_path / "whole", micro_batch_tokens=100_000, **settings)
    split = fit(policy, tmp_path / "split", micro_batch_tokens=1, **settings)
    start = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    assert farthest(whole.weights, {f"model.{k}": v for k, v in weights_of(start).items()}) > 1e-3
    assert farthest(whole.weights, split.weights) < 1e-6


def test_the_centre_makes_no_difference_on_policy(policy: Path, tmp_path: Path) -> None:
    """prox sampled the fresh rows, so regions around behave and around prox are equal bit for bit."""
    settings: dict[str, Any] = {"composer": OnPolicy(), "lr": 3e-3}
    grpo = fit(policy, tmp_path / "grpo", objective=Objective(), **settings)
    aligned = fit(policy, tmp_path / "aligned", objective=Objective(NoCorrection(), BehaveAligned()), **settings)
    assert max(row["policy/clip_frac"] for row in grpo.rows) > 0
    assert aligned.rows == grpo.rows
    assert same(aligned.weights, grpo.weights)


def test_rec_and_cispo_have_ppos_gradient(policy: Path, tmp_path: Path) -> None:
    """REC one-side and always weighted has PPO's, CISPO without a reached bound that of no clip. The losses differ."""
    settings: dict[str, Any] = {"composer": OnPolicy(), "lr": 0.3, "optimizer": torch.optim.SGD, "iterations": 2}

    def run(name: str, region: TrustRegion) -> Run:
        return fit(policy, tmp_path / name, objective=Objective(NoCorrection(), region), **settings)

    ppo, rec = run("ppo", PPOClip(0.1, 0.1, None)), run("rec", REC(weighted=True, clip_low=0.1, clip_high=0.1))
    assert max(row["policy/clip_frac"] for row in ppo.rows) > 0
    assert farthest(ppo.weights, rec.weights) < 1e-5
    free, cispo = run("free", Unbounded()), run("cispo", CISPO(clip_high=1e6))
    assert farthest(free.weights, cispo.weights) < 1e-5
    assert farthest(free.weights, ppo.weights) > 1e-4


@pytest.mark.parametrize("region", [M2PO(1e-3, 0.01, 0.01), BalancedClip(0.9, 0.95, 1.01, 1.1, 0.01)])
def test_bounds_of_a_minibatch_do_not_depend_on_micro_batches(
    policy: Path, tmp_path: Path, region: TrustRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every minibatch of a training with replay, bounds come from all tokens, however the rows are split.

    Gradients are compared at the same weights, since rounding grows over several steps. M2PO's cut is the value of a
    token, and rounding would decide on which side this token is. So here the cut is slightly above it.
    """
    cut = m2po.second_moment_cut
    monkeypatch.setattr(m2po, "second_moment_cut", lambda *tokens: 1.001 * cut(*tokens))
    watch, objective = Watch(), Objective(NoCorrection(), region)
    settings: dict[str, Any] = {"iterations": 3, "optimizer": torch.optim.SGD, "lr": 0.3, "max_grad_norm": None}
    run = fit(policy, tmp_path, objective=objective, callbacks=[watch], **settings)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    assert max(row["policy/clip_frac"] for row in run.rows) > 0
    gradients = []
    for seen in watch.seen:
        whole, gradient = step_of(policy, seen, objective)
        split, other_gradient = step_of(policy, seen, objective, micro_batch_tokens=1)
        assert len(whole["region"]) >= 2 and split["region"] == pytest.approx(whole["region"], rel=1e-5)
        gradients.append((gradient, other_gradient))
    assert farthest_apart(gradients) < 1e-5


def test_m2po_with_a_wide_budget_is_plain_importance_sampling(policy: Path, tmp_path: Path) -> None:
    watch, free = Watch(), Objective(NoCorrection(), CappedImportance(1e6))
    settings: dict[str, Any] = {"iterations": 3, "lr": 0.3, "optimizer": torch.optim.SGD}
    run = fit(policy, tmp_path, objective=free, callbacks=[watch], **settings)
    assert sum(row["replay/groups"] for row in run.rows) > 0
    for objective in (Objective(NoCorrection(), M2PO(1e6)), Objective(TruncatedIS(None), Unbounded())):  # w r = rho
        pairs = ((step_of(policy, seen, free)[1], step_of(policy, seen, objective)[1]) for seen in watch.seen)
        assert farthest_apart(pairs) < 1e-5


# -- gradients by hand -----------------------------------------------------------------------------------------


class Seen:
    """A minibatch, the weights at it, the weights at the start of its iteration, and its gradient."""

    def __init__(self, batch: Minibatch, start: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        self.batch, self.start, self.weights = batch, start, weights
        self.gradient: dict[str, Tensor] = {}


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Minibatch, batch_idx: int) -> None:
        weights = weights_of(pl_module.model)
        start = weights if batch.index == 0 else self.seen[-batch.index].start
        self.seen.append(Seen(batch, start, weights))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen[-1].gradient = {name: p.grad.clone() for name, p in pl_module.model.named_parameters()}


def step_of(
    policy: Path, seen: Seen, objective: Objective, micro_batch_tokens: int = 100_000
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the outputs of a training step on a recorded minibatch and its gradient, in float64."""
    settings: dict[str, Any] = {"max_grad_norm": None, "micro_batch_tokens": micro_batch_tokens}
    module = attached(InFloat64(str(policy), **slots(objective), **settings))
    module.model.load_state_dict(seen.weights, strict=False)
    return train(module, seen.batch)


def one_response(model: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Returns (T,) log-probs from full logits, one response at a time."""
    logits = model(input_ids=torch.cat((prompt, tokens))[None]).logits[0].float()
    return torch.stack([logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(tokens)])


def by_hand(folder: Path, seen: Seen, plain_ppo: bool = False, cap: float = 5.0) -> dict[str, Tensor]:
    """Computes the gradient of the loss as the paper states it, without the package's code."""
    model, old = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    model.load_state_dict(seen.weights, strict=False)
    old.load_state_dict(seen.start, strict=False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    total, tokens = torch.tensor(0.0), 0
    for group in seen.batch.groups:
        rewards = torch.tensor([response.parts["score"] for response in group.responses])
        for response, reward in zip(group.responses, rewards, strict=True):
            advantage = float((reward - rewards.mean()) / (rewards.std() + 1e-6)) if rewards.std() > 0 else 0.0
            logp = one_response(model, group.prompt_ids, response.token_ids)
            with torch.no_grad():
                prox = one_response(old, group.prompt_ids, response.token_ids)
            if plain_ppo:
                prox = response.behave_logp
            tokens += len(logp)
            for t in range(len(logp)):
                ratio = (logp[t] - prox[t]).exp()
                clipped = ratio.clamp(0.8, 1.28)
                surrogate = torch.minimum(ratio * advantage, clipped * advantage)
                if advantage < 0:
                    surrogate = torch.maximum(surrogate, torch.tensor(10.0 * advantage))
                weight = 1.0
                if group.version < seen.batch.version and not plain_ppo:
                    weight = min(float((prox[t] - response.behave_logp[t]).exp()), cap)
                total = total - weight * surrogate
    (total / tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_by_hand(policy: Path, tmp_path: Path) -> None:
    """Compares every minibatch of four iterations: first and later ones, fresh and replayed rows, clipped or not."""
    watch = Watch()
    objective = Objective(TruncatedIS(cap=1.5), PPOClip())
    settings: dict[str, Any] = {"iterations": 4, "lr": 3e-3, "max_grad_norm": None, "micro_batch_tokens": 300}
    run = fit(policy, tmp_path, objective=objective, proximal=ProximalSnapshot(), callbacks=[watch], **settings)
    assert len(watch.seen) == 8
    for index in (0, 1):
        assert any(not all(seen.batch.fresh) for seen in watch.seen if seen.batch.index == index)
    assert max(row.get("weight/replayed_capped_share", 0) for row in run.rows) > 0
    assert max(row["policy/clip_frac"] for row in run.rows) > 0
    assert farthest_apart((seen.gradient, by_hand(policy, seen, cap=1.5)) for seen in watch.seen) < 1e-4
