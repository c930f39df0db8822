"""The policy that popo_in_one_file.py starts from: a small Llama, trained on examples, without popo_lightning.

    python examples/starting_policy.py FOLDER

It learns from random true equations over the numbers of train problems, of which only a quarter reach the target.
So it writes well-formed steps and is sometimes correct; reinforcement learning must teach it to reach the target.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from random import Random

import torch
from popo_in_one_file import Problem, all_problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS = ["<pad>", "<eos>", *"0123456789+-*/=;,>:()"]  # one token each
BATCHES, BATCH_SIZE, LEARNING_RATE = 1200, 64, 2e-3
RIGHT = 0.25  # fraction of the examples that reach their target


def ways(numbers: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Yields every way to combine all numbers without a negative result: (text, result)."""
    if len(numbers) == 1:
        yield "", numbers[0]
    for left, right in dict.fromkeys(permutations(numbers, 2)):
        if left >= right:
            rest = tuple((Counter(numbers) - Counter((left, right))).elements())
            for operation, result in (("+", left + right), ("-", left - right), ("*", left * right)):
                for later, last in ways((*rest, result)):
                    yield f"{left}{operation}{right}={result}" + (";" + later if later else ""), last


def examples(problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Draws (prompt, response) pairs of random problems."""
    draw, known = Random(0), {}
    while True:
        problem = draw.choice(problems)
        if problem.numbers not in known:
            known[problem.numbers] = list(ways(problem.numbers))
        found = known[problem.numbers]
        if draw.random() < RIGHT:
            found = [way for way in found if way[1] == problem.target]
        yield problem.prompt, draw.choice(found)[0]


def build(folder: Path) -> None:
    """Trains the policy and writes it as an ordinary transformers folder: one to two minutes on a CPU."""
    print(f"building the starting policy in {folder}, once", flush=True)
    words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, BATCHES, pct_start=0.05)
    drawn = examples(all_problems()[0])
    for batch in range(BATCHES):
        ids, labels = [], []
        for prompt, response in (next(drawn) for _ in range(BATCH_SIZE)):
            ids.append(torch.tensor([*tokenizer(prompt + response).input_ids, 1]))
            labels.append(ids[-1].clone())
            labels[-1][: len(prompt)] = -100  # no loss on the prompt
        logits = model(input_ids=pad_sequence(ids, batch_first=True)).logits[:, :-1]
        target = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if batch % 100 == 99:
            print(f"batch {batch + 1} of {BATCHES}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
