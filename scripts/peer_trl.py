"""Runs TRL's GRPO on the prompts of bench_peers.py, in TRL's own environment.

Usage: TRL_PYTHON scripts/peer_trl.py SETTINGS.json OUT.json

The settings are plain and TRL's fastest on a CPU: no gradient checkpointing, no reference model (beta 0), no logging,
no checkpoints, transformers generation with its cache, and transformers' default fused AdamW. The reward is the
verifier that popo_lightning trains on, called as a plain function. Its package must be importable, and needs no other
package.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from machine import versions
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from popo_lightning.core.groups import REWARD_TOLERANCE
from popo_lightning.toys.countdown import verify_steps
from popo_lightning.verifiers.countdown import CountdownVerifier

VERIFIERS: dict[str, Any] = {"steps": verify_steps, "answer_tags": CountdownVerifier()}


class Clock(TrainerCallback):
    """Notes when each optimizer step ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Notes the start of training."""
        self.times = [time.time()]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Notes the end of a step."""
        self.times.append(time.time())


class Reward:
    """Grades responses, and counts the output of each iteration."""

    __name__ = "verifier"

    def __init__(self, verify: Any, group_size: int) -> None:
        self.verify = verify
        self.group_size = group_size
        self.iterations: list[dict[str, float]] = []

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], prefix: list[str], **_: Any
    ) -> list[float]:
        """Returns one score per response."""
        texts = [begun + text for begun, text in zip(prefix, completions, strict=True)]
        scores = [self.verify(json.loads(a), text)["score"] for a, text in zip(answer, texts, strict=True)]
        groups = [scores[start : start + self.group_size] for start in range(0, len(scores), self.group_size)]
        effective = sum(max(group) - min(group) > REWARD_TOLERANCE for group in groups)
        self.iterations.append(
            {
                "responses": len(scores),
                "tokens": sum(map(len, completion_ids)),
                "effective_share": effective / len(groups),
                "score": sum(scores) / len(scores),
            }
        )
        return scores


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains; returns times and counts."""
    tokenizer = AutoTokenizer.from_pretrained(settings["folder"])
    rows = settings["prompts"]
    for row in rows:
        if tokenizer(row["prompt"])["input_ids"] != row["ids"]:
            sys.exit(f"peer_trl: '{row['prompt']}' has other tokens here than in popo_lightning")
    kept = [{"prompt": r["prompt"], "answer": json.dumps(r["answer"]), "prefix": r["prefix"]} for r in rows]
    responses = settings["problems"] * settings["group_size"]
    steps = settings["minibatches"]
    micro = settings["micro_batch_responses"]
    config = GRPOConfig(
        output_dir=settings["work"],
        use_cpu=True,
        bf16=settings["dtype"] == "bf16",
        model_init_kwargs={"dtype": settings["weights"]},
        disable_dropout=True,
        gradient_checkpointing=False,
        # an iteration generates all its responses at once; each optimizer step takes an equal number of them
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=responses // steps // micro,
        generation_batch_size=responses,
        num_generations=settings["group_size"],
        num_iterations=1,
        max_steps=settings["iterations"] * steps,
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        seed=settings["seed"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    reward, clock = Reward(VERIFIERS[settings["verifier"]], settings["group_size"]), Clock()
    trainer = GRPOTrainer(
        model=settings["folder"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(kept),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    before = next(trainer.model.parameters()).detach().clone()
    trainer.train()
    after = next(trainer.model.parameters()).detach()
    return {
        "times": [clock.times[0], *clock.times[steps::steps]],
        "iterations": reward.iterations[: settings["iterations"]],
        "optimizer_steps": trainer.state.global_step,
        "weights_moved": not torch.equal(before, after),
        "threads": torch.get_num_threads(),
        "weights": str(after.dtype).removeprefix("torch."),
        "optimizer": str(config.optim),
        "versions": versions("torch", "trl", "transformers", "accelerate"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(json.dumps(main(json.loads(options.settings.read_text()))))
