"""POPO on one page, in plain PyTorch and transformers. It imports nothing from popo_lightning.

    python examples/popo_in_one_file.py

An iteration of `train`, the loop at the end:

    draw      32 problems. "2,7,5>10:" asks for 10 from 2, 7 and 5, each used once; "7-2=5;5*2=10" is correct
    generate  a group of 4 responses to each, with the log-probs of the policy that samples them
    grade     1 for a correct response, else 0; a group is effective if its rewards differ at all
    replay    the most recent effective groups of a first-in-first-out buffer replace the ineffective ones
    step      the groups are split into two optimizer steps

POPO is Group Prioritized Off-Policy Optimization, arXiv 2606.01281. docs/methods/popo.md says which parts of it are
documented and which are inferred. tests/methods/test_popo_in_one_file.py proves that this page reaches the weights of
`popo fit` with configs/task/countdown_tiny.yaml, configs/method/popo.yaml and the transformers engine, from the same
tokens.
"""

import argparse
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import combinations_with_replacement, count, islice, permutations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PROBLEMS = 32  # per iteration
GROUP_SIZE = 4  # responses per problem
MINIBATCHES = 2  # optimizer steps per iteration
MAX_NEW_TOKENS = 24
LEARNING_RATE, BETAS, MAX_GRAD_NORM = 6e-5, (0.9, 0.98), 1.0
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0  # bounds of the ratio: 0.8 and 1.28; 10 for negative advantages
WEIGHT_CAP = 2.0  # upper bound of the behavior weight
CAPACITY, MAX_AGE = PROBLEMS, 8  # groups in the buffer; iterations that a replayed group may be old

# The task: all problems of three numbers up to 12 with at least two solutions. A third of them is held out.
NUMBERS, LARGEST, MAX_TARGET, MIN_SOLUTIONS, ORDERS, HELD_OUT_SHARE, HELD_OUT = 3, 12, 99, 2, 6, 0.33, 500


# -- draw ----------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    prompt: str
    numbers: tuple[int, ...]
    target: int


def results(numbers: tuple[int, ...]) -> Iterator[int]:
    """Yields the result of each way to combine all numbers. No step may have a negative result."""
    if len(numbers) == 1:
        yield numbers[0]
    for left, right in dict.fromkeys(permutations(numbers, 2)):
        if left >= right:
            rest = tuple((Counter(numbers) - Counter((left, right))).elements())
            for result in (left + right, left - right, left * right):
                yield from results((*rest, result))


def all_problems() -> tuple[list[Problem], list[Problem]]:
    """Returns (train, held out), split by a hash of numbers and target. Train has problems in several number orders."""
    train, held_out = [], []
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), NUMBERS):
        ways = Counter(results(numbers))
        for target in sorted(t for t in ways if ways[t] >= MIN_SOLUTIONS and 1 <= t <= MAX_TARGET):
            name = f"{','.join(map(str, numbers))}>{target}"
            place = int.from_bytes(sha256(name.encode()).digest()[:8]) / 2**64
            orders = sorted(set(permutations(numbers)))
            Random(f"0/{name}").shuffle(orders)
            asked = [(place, Problem(f"{','.join(map(str, order))}>{target}:", numbers, target)) for order in orders]
            if place < HELD_OUT_SHARE:
                held_out += asked[:1]
            else:
                train += asked[:ORDERS]
    by_place = [[problem for _, problem in sorted(part, key=lambda p: p[0])] for part in (train, held_out)]
    return by_place[0], by_place[1][:HELD_OUT]


def endless(problems: list[Problem], seed: int) -> Iterator[Problem]:
    """Yields every problem once per pass, in a new order each pass."""
    for epoch in count():
        yield from Random(f"{seed}/{epoch}").sample(problems, len(problems))


# -- generate and grade --------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], seed: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Samples GROUP_SIZE responses per prompt at temperature 1: (T,) token ids with the end token, and (T,) log-probs.

    Each response draws from its own generator, so its tokens do not depend on the responses sampled beside it.
    """
    first = [Random(f"{seed}/{place}").getrandbits(62) for place in range(len(prompts))]
    draws = [np.random.default_rng(s + k).random(MAX_NEW_TOKENS) for s in first for k in range(GROUP_SIZE)]
    uniform, longest = torch.tensor(np.stack(draws)), max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]  # padded on the left, so that responses align
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    position, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache()
    running, length = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.long)
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    while running.any() and len(tokens) < MAX_NEW_TOKENS:
        known = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        probs = model(input_ids=ids, **known, logits_to_keep=1).logits[:, -1].double().softmax(-1)
        beyond = probs.cumsum(-1) > uniform[:, len(tokens), None]
        ids = beyond.byte().argmax(-1, keepdim=True)  # the token at which the cumulative probability passes the draw
        tokens.append(ids)
        logps.append(probs.gather(-1, ids).log().float())
        length += running
        running &= ids[:, 0] != model.config.eos_token_id
        mask, position = torch.cat([mask, torch.ones_like(ids)], 1), position[:, -1:] + 1
    sampled = zip(torch.cat(tokens, 1), torch.cat(logps, 1), length, strict=True)
    responses = iter([(token_ids[:n], logp[:n]) for token_ids, logp, n in sampled])
    return [list(islice(responses, GROUP_SIZE)) for _ in prompts]


def grade(problem: Problem, text: str) -> float:
    """Returns 1 if all steps are true, every number is used once and the last result is the target, else 0."""
    at_hand = list(problem.numbers)
    for written in text.strip().split(";"):
        step = re.fullmatch(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})", written)
        if step is None:
            return 0.0
        left, operation, right, result = int(step[1]), step[2], int(step[3]), int(step[4])
        for used in (left, right):
            if used not in at_hand:
                return 0.0
            at_hand.remove(used)
        truth = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}
        if result != truth[operation]:
            return 0.0
        at_hand.append(result)
    return float(at_hand == [problem.target])


# -- replay --------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    problem: Problem
    prompt: list[int]
    responses: list[tuple[Tensor, Tensor]]  # token ids, and the log-probs of the policy that sampled them: behave
    rewards: Tensor  # (GROUP_SIZE,)
    version: int  # the iteration that sampled it


def is_effective(group: Group) -> bool:
    """Returns whether its rewards differ. If not, all advantages are 0, and so is the gradient."""
    return bool(group.rewards.max() - group.rewards.min() > 1e-6)


def most_recent(buffer: deque[Group], wanted: int, version: int, batch: list[Group]) -> list[Group]:
    """Takes the newest version's groups first, in order of insertion within a version. They stay in the buffer.

    Groups of problems that the batch already has come last. A short buffer gives fewer groups than wanted.
    """
    present = {group.problem for group in batch}
    others: list[Group] = []
    repeated: list[Group] = []
    for group in sorted(buffer, key=lambda group: -group.version):
        if version - group.version <= MAX_AGE:
            (repeated if group.problem in present else others).append(group)
            present.add(group.problem)
    return (others + repeated)[:wanted]


# -- step ----------------------------------------------------------------------------------------------------------

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # (P,) prompt; (T,) token ids, behave_logp, advantage, fresh


def advantages(rewards: Tensor) -> Tensor:
    """Returns (K,) advantages for a group's (K,) rewards: GRPO, arXiv 2402.03300 section 4.1, with the unbiased std."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def rows_of(groups: list[Group], version: int) -> list[Row]:
    """Returns the responses of groups. The longest come first, so that sums are rounded as in the framework."""
    rows = []
    for group in groups:
        for (token_ids, logp), advantage in zip(group.responses, advantages(group.rewards), strict=True):
            fresh = torch.full(token_ids.shape, group.version == version)
            rows.append((torch.tensor(group.prompt), token_ids, logp, advantage.expand_as(logp), fresh))
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]), reverse=True)


def logprobs(model: Any, rows: list[Row]) -> Tensor:
    """Returns (N,) log-probs of all response tokens, row by row. Right padding needs no mask: no token looks ahead."""
    ids = pad_sequence([torch.cat(row[:2]) for row in rows], batch_first=True)
    sampled = [torch.cat([torch.zeros_like(prompt), torch.ones_like(response)]) for prompt, response, *_ in rows]
    before = pad_sequence(sampled, batch_first=True)[:, 1:].bool()  # a token is chosen in the state before it
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][before]
    logp = model.get_output_embeddings()(states).log_softmax(-1)
    return logp.gather(-1, ids[:, 1:][before][:, None])[:, 0]


def popo_loss(logp: Tensor, prox_logp: Tensor, behave_logp: Tensor, advantage: Tensor, fresh: Tensor) -> Tensor:
    """Returns -J, with  J = mean over tokens of  w min(r A, clip(r) A),  w = pi_prox / pi_behave,  r = pi / pi_prox.

    prox is the policy at the start of the iteration, behave the one that sampled the token: the decoupled objective of
    arXiv 2110.00641. One trust region around prox serves all tokens. w has no gradient; it corrects replayed tokens for
    their age. On fresh tokens, where behave is prox, w = 1 and this is DAPO's surrogate (arXiv 2503.14476).
    All arguments are (N,).
    """
    weight = (prox_logp - behave_logp).exp().clamp(max=WEIGHT_CAP)
    weight = torch.where(fresh, 1.0, weight)
    ratio = (logp - prox_logp).exp()
    # PPO's clip, arXiv 1707.06347 equation 7, and for negative advantages the dual clip of arXiv 1912.09729
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    loss = torch.where(advantage < 0, torch.minimum(loss, -DUAL_CLIP * advantage), loss)
    return (weight * loss).mean()


# -- the loop ------------------------------------------------------------------------------------------------------


def graded_groups(
    model: Any, tokenizer: Any, asked: list[Problem], seed: int, version: int, generate: Callable
) -> list[Group]:
    """Samples a list of groups, one for each problem."""
    groups, prompts = [], [tokenizer(problem.prompt).input_ids for problem in asked]
    for problem, prompt, responses in zip(asked, prompts, generate(model, prompts, seed), strict=True):
        texts = [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids, _ in responses]
        rewards = torch.tensor([grade(problem, text) for text in texts])
        groups.append(Group(problem, prompt, responses, rewards, version))
    return groups


def train(model: Any, tokenizer: Any, seed: int, generate: Callable = generate) -> Iterator[dict[str, float]]:
    """Trains the model in place; yields the numbers of each iteration at its end."""
    problems, buffer = endless(all_problems()[0], seed), deque[Group](maxlen=CAPACITY)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, weight_decay=0.0, fused=True)
    for version in count():
        asked = list(islice(problems, PROBLEMS))
        draws = Random(f"{seed}/0/{version}/rollout/1").getrandbits(62)  # the seed of all their draws
        sampled = graded_groups(model, tokenizer, asked, draws, version, generate)
        effective = [group for group in sampled if is_effective(group)]
        replayed = most_recent(buffer, len(sampled) - len(effective), version, effective)
        buffer.extend(effective)  # after the selection, so that an iteration's own groups do not fill its places
        groups = effective + replayed
        Random(f"{seed}/0/{version}/deal").shuffle(groups)
        minibatches = [rows_of(groups[part::MINIBATCHES], version) for part in range(min(MINIBATCHES, len(groups)))]
        with torch.no_grad():
            prox = [logprobs(model, rows) for rows in minibatches]  # of all minibatches, before the first step
        for rows, prox_logp in zip(minibatches, prox, strict=True):
            behave_logp, advantage, fresh = (torch.cat(column) for column in list(zip(*rows, strict=True))[2:])
            optimizer.zero_grad()
            popo_loss(logprobs(model, rows), prox_logp, behave_logp, advantage, fresh).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        yield {
            "reward": torch.stack([group.rewards for group in sampled]).mean().item(),
            "effective": len(effective) / len(sampled),
            "replayed": len(replayed) / len(sampled),
            "age": sum(version - group.version for group in replayed) / max(1, len(replayed)),
        }


def main() -> None:
    """Trains, and prints the numbers of each iteration and, every 50 iterations, the share of correct responses."""
    parser = argparse.ArgumentParser(description="POPO on the embedded Countdown task, on a CPU.")
    parser.add_argument("--model", type=Path, default=Path("runs/starting_policy"), help="built there if missing")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)  # in a model this small threads would wait for each other
    if not args.model.exists():
        from starting_policy import build  # supervised learning, in the file beside this one

        build(args.model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    loop, held_out, began = train(model, tokenizer, args.seed), all_problems()[1], time.perf_counter()
    for iteration in range(args.iterations + 1):
        if iteration % 50 == 0 or iteration == args.iterations:
            groups = graded_groups(model, tokenizer, held_out, 0, 0, generate)
            right = torch.stack([group.rewards for group in groups]).mean()
            print(f"\nafter {iteration} iterations: {right:.3f} of the responses to held-out problems are right\n")
        if iteration == args.iterations:
            break
        numbers = next(loop) | {"seconds": time.perf_counter() - began}
        if iteration % 50 == 0:
            print(" " * 9, *(f"{name:>9}" for name in numbers))
        print(f"{iteration + 1:9}", *(f"{number:9.3f}" for number in numbers.values()), flush=True)


if __name__ == "__main__":
    main()
