"""Measures the cost of an iteration beyond generation and forward/backward.

Runs `popo fit` and, after each of its iterations, repeats the bare work in the same process: `llm.generate` of the
same prompts with the same seed, and forward, backward, clipping and optimizer step of the same minibatches on a copy
of the model. Prints the ratio of the two with its spread, and the fraction of an iteration that is neither generation
nor training steps. The proximal log-prob pass is counted separately.

Usage: python scripts/bench_overhead.py [--iterations 60] [--out FILE.json] [settings of popo fit ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import lightning as L
import torch
from torch import Tensor

from popo_lightning.cli import main as cli
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.engines.base import Sampling
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.model.padded_rows import pad_rows

WARM_UP = 5


class TimedEngine(VLLMEngine):
    """VLLMEngine that remembers its last training call, so that it can be repeated bare."""

    def stream(self, prompts: Any, n: int, sampling: Sampling, seed: int) -> Any:
        """Generates as VLLMEngine does, and remembers the call."""
        self.last = (prompts, n, sampling, seed)
        return super().stream(prompts, n, sampling, seed)

    def generate_bare(self) -> None:
        """Runs vLLM alone, with the same prompts and draws, and reads nothing from the result."""
        from vllm import SamplingParams

        prompts, n, sampling, seed = self.last
        inputs = [{"prompt_token_ids": prompt.ids.tolist()} for prompt in prompts]
        parameters = SamplingParams(
            n=n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            detokenize=False,
            flat_logprobs=True,
        )
        self._llm.reset_prefix_cache()
        torch.manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):
            self._llm.generate(inputs, parameters, use_tqdm=False)


class BareWork(L.Callback):
    """Before each iteration, repeats the last one's work bare and times it."""

    rows: ClassVar[list[dict[str, float]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Copies the model."""
        self.model = copy.deepcopy(pl_module.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9)
        self.minibatches: list[Minibatch] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Collects the minibatches."""
        self.minibatches.append(batch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Repeats the work and times it. Callbacks of trainer.callbacks run first, before this iteration's clocks."""
        if not self.minibatches:
            return
        metrics = pl_module.iteration_metrics
        with torch.random.fork_rng():
            began = time.perf_counter()
            trainer.datamodule.engine.generate_bare()  # type: ignore[attr-defined]
            generated = time.perf_counter()
            for minibatch in self.minibatches:
                self.step(minibatch, pl_module.advantages(minibatch))
            trained = time.perf_counter()
        row = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        self.rows.append(row | {"bare_generate": generated - began, "bare_train": trained - generated})
        self.minibatches = []

    def step(self, minibatch: Minibatch, advantages: list[Tensor]) -> None:
        """Takes a minimal policy-gradient step: one padded forward and backward pass, clipping, optimizer."""
        rows = pad_rows(minibatch.rows(advantages=advantages))
        logits = self.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long()).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
        predicted = rows.is_response[:, 1:]
        loss = -(logp * rows.columns["advantages"] * predicted).sum() / predicted.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options, settings = parser.parse_known_args()
    if not settings:
        settings = ["--config", "configs/task/countdown_tiny.yaml", "--config", "configs/method/popo.yaml"]
    cli.run(
        [
            "fit",
            *settings,
            f"--trainer.max_epochs={options.iterations + WARM_UP + 1}",
            f"--trainer.callbacks+={__name__}.BareWork",
            f"--data.engine={__name__}.TimedEngine",
            "--evaluation.at_start=false",
            "--evaluation.every_n_iterations=0",
            "--evaluation.samples=0",
            "--run.method=overhead",
        ]
    )
    result = summarize(BareWork.rows[WARM_UP:])
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def summarize(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians in milliseconds. For iterations without their proximal pass it also has the ratio to their bare work, and
    the fraction that is neither generation nor training steps.
    """
    own = [r["iteration"] - r.get("prox", 0.0) for r in rows]
    ratios = [seconds / (r["bare_generate"] + r["bare_train"]) for seconds, r in zip(own, rows, strict=True)]
    shares = [1 - (r["generate"] + r["train"]) / seconds for seconds, r in zip(own, rows, strict=True)]
    quartiles, share_quartiles = statistics.quantiles(ratios, n=4), statistics.quantiles(shares, n=4)
    phases = sorted({name for row in rows for name in row})
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "iterations": len(rows),
        "ratio_median": round(quartiles[1], 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "other_share_median": round(share_quartiles[1], 4),
        "other_share_quartiles": [round(share_quartiles[0], 4), round(share_quartiles[2], 4)],
        "milliseconds": {name: round(1000 * statistics.median([r.get(name, 0.0) for r in rows]), 2) for name in phases},
    }


if __name__ == "__main__":
    main()
