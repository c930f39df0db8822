"""A tiny policy trained from scratch for the embedded task, built on first use and cached.

The result is an ordinary transformers folder (Llama weights, config, tokenizer). Later code treats it like any other
model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.toys.countdown import CountdownSteps, Step, counts_of, solutions, whole_result, write_steps
from popo_lightning.toys.warm_start_settings import check_settings

RECIPE = 4  # part of the cache address: raise it when a change to this file changes the weights it makes
SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*/=;,>:()"]
IGNORED = -100

log = logging.getLogger(__name__)


def save_model(model: Any, folder: Path) -> None:
    """Writes a model on any rank. transformers itself writes only on rank 0, which another node does not have."""
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)


def train_supervised(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], learning_rate: float, steps: int, what: str
) -> None:
    """Trains by AdamW with a warm-up over 5% of the steps, cosine decay to zero, and gradients clipped to norm 1.

    Args:
        loss: Returns the loss of the next batch.
        parameters: Parameters to train.
        learning_rate: Peak learning rate.
        steps: Number of batches.
        what: Name of the policy, for the progress bar.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    for _ in track(range(steps), description=f"Building the {what} (once)"):
        found = loss()
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    log.info("warm start ended at a loss of %.3f", found.item())


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of labeled next tokens, from (R, L, vocabulary) logits and (R, L) labels."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def symbol_tokenizer(symbols: Sequence[str], **special: Any) -> Any:
    """Makes a fast tokenizer with one token per symbol, and further special tokens by transformers' names."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", **special)


@dataclass(eq=False)
class CountdownWarmStart(WarmStart):
    """A small Llama that writes well-formed Countdown steps and is sometimes correct.

    It is trained on random true equations over the numbers of training problems. A fraction of these equations reaches
    the target. Reinforcement learning has to teach the rest: reaching the target.

    Args:
        right: Fraction of the training examples whose steps reach the target.
        examples: Number of training examples, counted with repetition.
        hidden_size: Width of the Llama.
        layers: Depth of the Llama.
        heads: Attention heads; hidden_size / heads must be 32, 64, 80, 96, 112, 128 or 256 for vLLM on a CPU.
        intermediate_size: Width of its feed-forward layers.
        learning_rate: Peak AdamW learning rate, with a warm-up over 5% of the steps and cosine decay to zero.
        batch_size: Examples per step.
        seed: Seed of weights and examples.
        numbers: Same as data.task.numbers of CountdownSteps.
        largest_number: Same as data.task.largest_number.
        operations: Same as data.task.operations.
        held_out_share: Same as data.task.held_out_share; held-out problems are never trained on.
        device: Device to build it on, such as cpu or cuda. Weights built on different devices differ by rounding.
    """

    right: float = 0.25
    examples: int = 75_000
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 320
    learning_rate: float = 2e-3
    batch_size: int = 64
    seed: int = 0
    numbers: int | list[int] = 3
    largest_number: int = 12
    operations: str = "+-*"
    held_out_share: float = 0.33
    device: str = "cpu"

    name = "countdown-llama"

    def __post_init__(self) -> None:
        check_settings(vars(self))

    def recipe(self) -> dict[str, object]:
        """Returns the settings and the recipe's number. A CPU device is left out, as in recipes before this setting."""
        settings = dict(vars(self))
        if self.device == "cpu":
            del settings["device"]
        return {"recipe": RECIPE, **settings}

    def config(self) -> Any:
        """Returns the Llama's configuration, without building it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=256,
            pad_token_id=SYMBOLS.index("<pad>"),
            eos_token_id=SYMBOLS.index("<eos>"),
            bos_token_id=None,
            tie_word_embeddings=True,
        )

    def build(self, folder: Path) -> None:
        """Trains on next-token prediction over the answers and saves the folder."""
        from transformers import LlamaForCausalLM

        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise SettingError(f"model.warm_start.device is '{self.device}', which torch does not see; use cpu")
        tokenizer = symbol_tokenizer(SYMBOLS)
        with torch.random.fork_rng():  # forks the generators of all devices
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(self.config()).float().to(self.device)
            self._train(model, self._examples())
        save_model(model.cpu(), folder)
        tokenizer.save_pretrained(folder)

    def _train(self, model: torch.nn.Module, examples: Iterator[tuple[str, str]]) -> None:
        def loss() -> Tensor:
            input_ids, labels = _encode([next(examples) for _ in range(self.batch_size)])
            return answer_loss(model(input_ids=input_ids.to(self.device)).logits, labels.to(self.device))

        train_supervised(
            loss, list(model.parameters()), self.learning_rate, self.examples // self.batch_size, "tiny policy"
        )

    def _examples(self) -> Iterator[tuple[str, str]]:
        problems = [self._problems_of(count) for count in counts_of(self.numbers)]
        answers: dict[str, dict[int, list[str]]] = {}
        draw = random.Random(f"warm start {self.seed}")
        while True:
            problem = draw.choice(problems[0] if len(problems) == 1 else draw.choice(problems))
            numbers, target = problem.answer["numbers"], problem.answer["target"]
            # Every order of three numbers gives six times the prompts, and better arithmetic on held-out problems.
            prompt = f"{','.join(map(str, draw.sample(numbers, len(numbers))))}>{target}:"
            if draw.random() < self.right:
                key = str(numbers)
                if key not in answers:
                    answers[key] = by_target(numbers, self.operations)
                yield prompt, draw.choice(answers[key][target])
            else:
                yield prompt, random_steps(numbers, self.operations, draw)

    def _problems_of(self, count: int) -> list[Problem]:
        """Returns all training problems with this count of numbers."""
        settings = (count, self.largest_number, self.operations)
        return CountdownSteps(
            *settings, held_out_share=self.held_out_share, held_out_problems=1, min_ways=1, orders=1
        ).train_problems()


def by_target(numbers: Sequence[int], operations: str) -> dict[int, list[str]]:
    """Returns every way to combine all numbers, as text, by its result."""
    found: dict[int, list[str]] = {}
    for steps in solutions(numbers, operations):
        found.setdefault(steps[-1][3], []).append(write_steps(steps))
    return found


def random_steps(numbers: Sequence[int], operations: str, draw: random.Random) -> str:
    """Draws well-formed true equations over all the numbers, regardless of the target.

    The numbers must have some such equations. A draw that leads nowhere (two divided by three) starts again.
    """
    at_hand = list(numbers)
    steps: list[Step] = []
    failures = 0
    while len(at_hand) > 1:
        left, right = draw.sample(at_hand, 2)
        operation = draw.choice(operations)
        if operation in "+*-" and left < right:
            left, right = right, left
        result = whole_result(left, operation, right)
        if result is None:
            failures += 1
            if failures % 20 == 0:
                at_hand, steps = list(numbers), []
            continue
        at_hand.remove(left)
        at_hand.remove(right)
        at_hand.append(result)
        steps.append((left, operation, right, result))
    return write_steps(steps)


def _encode(examples: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Returns (input ids, labels), both (batch, longest). Labels are the answer and its end token, else IGNORED."""
    places = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    ids = [torch.tensor([places[symbol] for symbol in [*prompt, *answer, "<eos>"]]) for prompt, answer in examples]
    labels = [row.clone() for row in ids]
    for row, (prompt, _) in zip(labels, examples, strict=True):
        row[: len(prompt)] = IGNORED
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)
