"""Peak memory of training SmolLM2-135M with all weights and with adapters, on a CPU.

Usage: python scripts/bench_lora.py MODEL_FOLDER [--out benchmarks/lora_memory.json]

Each case is a process of its own that takes two optimizer steps (AdamW) on a minibatch of 8 rows of 192 tokens, in one
micro-batch, without an engine, in bf16-mixed where the weights are bfloat16. The case of 4 bits needs bitsandbytes. The
peak is resident memory above that of the process before the model loads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "all weights, float32": {"dtype": "float32"},
    "lora r 16, float32 base": {"dtype": "float32", "lora": 16},
    "all weights, bfloat16": {"dtype": "bfloat16"},
    "lora r 16, bfloat16 base": {"dtype": "bfloat16", "lora": 16},
    "lora r 16, 4-bit base": {"dtype": "bfloat16", "lora": 16, "four_bit": True},
}
PROMPT, RESPONSE, RESPONSES, GROUPS, STEPS = 64, 128, 4, 2, 2


def main() -> None:
    """Measures every case and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/lora_memory.json"))
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.model, **CASES[options.case])))
        return
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, str(options.model), "--case", case]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[case] = json.loads(printed.strip().splitlines()[-1])
        print(case, found[case])
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, dtype: str, lora: int | None = None, four_bit: bool = False) -> dict[str, Any]:
    """Peak bytes above the start, number of trained parameters, and bytes of the state in a checkpoint."""
    import lightning
    import peft  # noqa: F401  # its code does not belong to the model's memory
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from popo_lightning.core.groups import Group, Response
    from popo_lightning.core.minibatch import Minibatch
    from popo_lightning.core.problems import Problem
    from popo_lightning.model.lora import Lora
    from popo_lightning.policy import PolicyModule

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(100, 40000, (length,))

    torch.manual_seed(0)
    groups = [
        Group(
            number,
            Problem(str(number), "", ""),
            tokens(PROMPT),
            [
                Response(
                    tokens(RESPONSE), torch.full((RESPONSE,), -5.0), "stop", "", {"score": float(i % 2), "acc": 0.0}
                )
                for i in range(RESPONSES)
            ],
            0,
        )
        for number in range(GROUPS)
    ]
    before = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    module = PolicyModule(path=str(folder), dtype=dtype, lora=None if lora is None else Lora(r=lora, four_bit=four_bit))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="bf16-mixed" if dtype == "bfloat16" else "32-true",
    )
    minibatches: Any = [Minibatch(groups, 0, step) for step in range(STEPS)]  # a list is a dataset
    trainer.fit(module, torch.utils.data.DataLoader(minibatches, batch_size=None))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer: Any = module.optimizers()
    state = [value for each in optimizer.optimizer.state.values() for value in each.values()]
    saved = {value.data_ptr(): value for value in module.state_dict().values()}  # tied weights count once
    return {
        "peak_bytes": getrusage(RUSAGE_SELF).ru_maxrss * 1024 - before,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in state),
        "checkpoint_weight_bytes": sum(value.numel() * value.element_size() for value in saved.values()),
    }


if __name__ == "__main__":
    main()
