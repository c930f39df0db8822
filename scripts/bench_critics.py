"""Measures the error of each critic against the known values of a policy.

Usage: python scripts/bench_critics.py [--iterations 40] [--seeds 1 2 3] [--out FILE.json]

A response is six digits from 0 to 5, and its reward is 1 if they add up to 18 or more. The policy draws each digit with
the same probabilities, so the value of every state is known exactly: the probability that the remaining digits add up
to the missing sum. The critic is a random Llama of 0.1M parameters, which learns as in a run while the policy does not
change. Its error is the root mean squared difference from the known values, over the states of 256 further responses.

FILE.png beside FILE.json has two panels: fresh responses of the policy in every iteration, and a buffer of responses of
another policy, which draws all digits equally often, with a share of continuations by the present one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from machine import machine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.model.critic import Critic, ValueModel
from popo_lightning.model.critic_heads import CategoricalHead, GaussianHead
from popo_lightning.model.critic_target import TargetCopy, TargetCritic
from popo_lightning.model.padded_rows import pad_rows
from popo_lightning.objectives.generalized_advantage import GAE
from popo_lightning.replay.composer import Iteration
from popo_lightning.replay.continuations import fresh_continuations
from popo_lightning.training.gradients import clip_gradients
from popo_lightning.training.minibatch_targets import minibatch_targets

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS, LENGTH, NEEDED, START = 6, 6, 18, 7  # START is the only token of the prompt
PRESENT, STALE = (1 / 12, 1 / 12, 1 / 6, 1 / 6, 1 / 4, 1 / 4), (1 / 6,) * 6
LR, GROUPS, RESPONSES, STEPS, TESTED, BUFFER = 1e-3, 16, 4, 4, 64, 64  # numbers of groups, except responses and steps
EVERY = 5  # iterations between two measurements


def fresh_arms() -> dict[str, tuple[Critic, float]]:
    """Critics and lambdas of the arms on fresh responses."""
    return {
        "scalar": (Critic(LR), 1.0),
        "twin": (Critic(LR, None, heads=2), 1.0),
        "gaussian": (Critic(LR, None, head=GaussianHead()), 1.0),
        "categorical": (Critic(LR, None, head=CategoricalHead()), 1.0),
        "scalar, lambda 0.5": (Critic(LR), 0.5),
        "target, lambda 0.5": (Critic(LR, target=TargetCritic(polyak=0.05)), 0.5),
    }


@cache
def known(missing: int, left: int) -> float:
    """Probability that so many digits of the present policy add up to the missing sum."""
    if left == 0:
        return float(missing <= 0)
    return sum(chance * known(missing - digit, left - 1) for digit, chance in enumerate(PRESENT))


class Bench(Iteration):
    """The task and its policies; a composer's iteration for continuations.

    Args:
        seed: Seed of all draws.
    """

    version, effective_key, problems, group_size = 1, "score", GROUPS, RESPONSES

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.seeded = random.Random(seed)
        self.problem = Problem("digits", "", NEEDED)

    def made(self, count: int, n: int, chances: Sequence[float], begun: Sequence[Tensor] | None = None) -> list[Group]:
        """Samples graded groups of n responses, which continue the prefixes if any are given."""
        found = []
        for place in range(count):
            prefix = torch.empty(0, dtype=torch.long) if begun is None else begun[place]
            weights = torch.tensor(chances).expand(n, DIGITS)
            digits = torch.multinomial(weights, LENGTH - len(prefix), replacement=True, generator=self.generator)
            scores = (digits.sum(dim=1) + prefix.sum() >= NEEDED).float().tolist()
            responses = [
                Response(row, torch.zeros(len(row)), "stop", parts={"score": score, "acc": score})
                for row, score in zip(digits, scores, strict=True)
            ]
            found.append(Group(place, self.problem, torch.cat((torch.tensor([START]), prefix)), responses, 1))
        return found

    def sample(self, problems: Sequence[Problem], n: int, prefixes: Sequence[Tensor] | None = None) -> list[Group]:
        """Samples by the present policy."""
        return self.made(len(problems), n, PRESENT, prefixes)

    def rollout(self, count: int | None = None, n: int | None = None) -> list[Group]:
        """Samples by the present policy."""
        return self.made(GROUPS if count is None else count, RESPONSES if n is None else n, PRESENT)

    def logprobs(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Not used."""
        raise NotImplementedError

    reference_logprobs = logprobs

    def random(self, *purpose: object) -> random.Random:
        """Generator of the next draws of this seed."""
        return self.seeded


def language_model(seed: int) -> Any:
    """Model that the critic starts as a copy of."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=START + 1, max_position_embeddings=32, **sizes)).eval()


def known_values(groups: Sequence[Group]) -> Tensor:
    """(N,) values of all states of whole responses, row by row."""
    rows = [response.token_ids.tolist() for group in groups for response in group.responses]
    return torch.tensor([known(NEEDED - sum(row[:t]), LENGTH - t) for row in rows for t in range(LENGTH)])


def values_of(critic: Critic, model: ValueModel, minibatch: Minibatch) -> list[Tensor]:
    """(T,) values of each row."""
    with torch.no_grad():
        rows = pad_rows(minibatch.rows())
        values = critic.estimates(model(rows))["values"]
        return [row[mask] for row, mask in zip(values, rows.mask, strict=True)]


class Learner:
    """A critic that learns as in a run, while the policy does not change.

    Args:
        critic: Settings of the critic.
        lam: Lambda of GAE.
        model: Model that the critic starts as a copy of.
    """

    def __init__(self, critic: Critic, lam: float, model: Any) -> None:
        self.critic, self.advantage = critic, GAE(lam=lam)
        self.model = ValueModel(model, critic)
        self.copied: TargetCopy | None = critic.copied(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=critic.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.steps = 0

    def learn(self, groups: Sequence[Group]) -> None:
        """Runs one iteration: values at its start, then a step for each of its minibatches."""
        parts = [Minibatch(groups[place::STEPS], 1, place) for place in range(STEPS)]
        every = [[each for each in (part, part.of_critic) if each is not None] for part in parts]
        for each in (one for part in every for one in part):
            estimates = {"values": values_of(self.critic, self.model, each)}
            if self.copied is not None:
                estimates["target_values"] = values_of(self.critic, self.copied.model, each)
            found = minibatch_targets(each, self.advantage, "score", self.critic, estimates).of_critic
            each.recorded.update(found)
        for part in every:
            self._step(part)

    def _step(self, part: Sequence[Minibatch]) -> None:
        running, tokens = self.model.running_std, sum(each.tokens for each in part)
        self.optimizer.zero_grad()
        std = torch.zeros(self.critic.heads)
        for each in part:
            rows = pad_rows(each.rows())
            out = self.model(rows)
            of_critic = (out, rows.columns["values"], rows.columns["returns"], rows.mask, tokens, running)
            self.critic.loss(*of_critic).backward()
            found = self.critic.head.std(self.critic.by_head(out.detach()))
            std += 0 if found is None else found[rows.mask].sum(dim=0)
        self.critic.shape_gradients(self.model, self.copied, 0)
        clip_gradients(self.model, self.critic.max_grad_norm)
        self.optimizer.step()
        self.steps += 1
        if running is not None:
            running.lerp_(std / tokens, self.critic.head.running_rate)
        if self.critic.target is not None and self.copied is not None:
            self.critic.target.follow(self.model, self.copied, self.steps)

    def error(self, groups: Sequence[Group]) -> float:
        """Root mean squared error over all states of whole responses."""
        values = torch.cat(values_of(self.critic, self.model, Minibatch(groups, 1, 0)))
        return float(((values - known_values(groups)) ** 2).mean().sqrt())


def courses(seed: int, iterations: int) -> dict[str, list[float]]:
    """Errors by arm, every few iterations from the start."""
    bench, model = Bench(seed), language_model(seed)
    tested, stored = bench.rollout(TESTED), bench.made(BUFFER, RESPONSES, STALE)
    stream = [bench.rollout() for _ in range(iterations)]
    draws = [bench.seeded.sample(stored, GROUPS) for _ in range(iterations)]
    learners = {f"fresh: {name}": (Learner(*arm, model), 0.0) for name, arm in fresh_arms().items()}
    learners |= {f"stale: share {share:g}": (Learner(Critic(LR), 1.0, model), share) for share in (0.0, 0.05, 0.25)}
    found: dict[str, list[float]] = {"spread of the known values": [float(known_values(tested).std())]}
    for name, (learner, share) in learners.items():
        found[name] = [learner.error(tested)]
        for i in range(iterations):
            replayed = [*draws[i], *fresh_continuations(share, draws[i], bench)]
            learner.learn(replayed if name.startswith("stale") else stream[i])
            if (i + 1) % EVERY == 0:
                found[name].append(learner.error(tested))
        print(seed, f"{name:28}", " ".join(f"{each:.3f}" for each in found[name]), flush=True)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws two panels: means over seeds, with each seed as a thin line."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    places = [EVERY * i for i in range(result["iterations"] // EVERY + 1)]
    for axis, kind in zip(axes, ("fresh", "stale"), strict=True):
        names = [name for name in result["errors"] if name.startswith(kind)]
        for number, name in enumerate(names):
            runs = result["errors"][name]
            axis.plot(places, [statistics.mean(each) for each in zip(*runs, strict=True)], f"C{number}", label=name)
            for run in runs:
                axis.plot(places, run, f"C{number}", linewidth=0.5, alpha=0.5)
        axis.set_xlabel("iterations")
        axis.legend(fontsize=7)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("error of the value (RMS)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "critics.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [courses(seed, options.iterations) for seed in options.seeds]
    errors = {name: [[round(each, 4) for each in run[name]] for run in runs] for name in runs[0]}
    result = {"machine": machine(), "iterations": options.iterations, "every": EVERY, "seeds": options.seeds}
    result["errors"] = errors
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
