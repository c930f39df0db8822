"""Shows why vLLM's CPU build computes some families differently from their files.

    python scripts/vllm_faults.py     # each of these families again, with vLLM's fault fixed: it must agree

The fault could also be that a configuration is too small. So each reason names one part of vLLM's code, and with only
that part fixed, in the memory of one process, the same model agrees with the trainer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

ROTARY = "rotates heads wrongly where they have an axis of their own (its kernel of rotary embeddings)"
ROUTER = "scores experts that are not in groups by softmax alone, and leaves out their router's bias"

# Reason for each family, as the rest of a sentence after "vLLM"; MENDED has the fixes.
REASONS = {
    "ernie4_5_moe": f"on a CPU {ROUTER}",
    "deepseek_v2": f"on a CPU {ROTARY}",
    "deepseek_v3": f"on a CPU {ROTARY}",
    "minimax_m2": f"on a CPU {ROUTER}",
    "phimoe": "leaves out the bias of the head",
    "lfm2": f"on a CPU {ROTARY}",
    "lfm2_moe": f"on a CPU {ROTARY}, and {ROUTER}",
}


def mend_rotary() -> None:
    """Replaces the kernel by plain torch."""
    from vllm.model_executor.layers.rotary_embedding import base, deepseek_scaling_rope

    for module in (base, deepseek_scaling_rope):
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and kind.__module__ == module.__name__ and "forward_cpu" in vars(kind):
                setattr(kind, "forward_cpu", getattr(kind, "forward_native"))  # noqa: B009, B010


def mend_router() -> None:
    """Chooses experts by scores and bias, and weights them by the scores alone."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    before = CPURouter._compute_routing

    def route(self: Any, hidden: Any, logits: Any, kind: Any, *, input_ids: Any = None) -> tuple[Any, Any]:
        if self.use_grouped_topk or self.custom_routing_function is not None:
            return before(self, hidden, logits, kind, input_ids=input_ids)
        scores = logits.float().sigmoid() if self.scoring_func == "sigmoid" else logits.float().softmax(-1)
        bias = self.e_score_correction_bias
        chosen = (scores if bias is None else scores + bias).topk(self.top_k, -1)[1]
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.routed_scaling_factor).contiguous(), chosen.to(torch.int32).contiguous()

    CPURouter._compute_routing = route


def mend_head() -> None:
    """Adds the head's bias."""
    from vllm.model_executor.models.phimoe import PhiMoEForCausalLM

    def logits(self: Any, hidden: Any) -> Any:
        return self.logits_processor(self.lm_head, hidden, self.lm_head.bias)

    PhiMoEForCausalLM.compute_logits = logits


MENDED: dict[str, tuple[Callable[[], None], ...]] = {
    "ernie4_5_moe": (mend_router,),
    "deepseek_v2": (mend_rotary,),
    "deepseek_v3": (mend_rotary,),
    "minimax_m2": (mend_router,),
    "phimoe": (mend_head,),
    "lfm2": (mend_rotary,),
    "lfm2_moe": (mend_rotary, mend_router),
}


def mend(family: str) -> None:
    """Fixes vLLM for one family in this process; call it before the family's model is loaded."""
    for each in MENDED[family]:
        each()


def main() -> None:
    """Runs the command. The exit code is 1 if a family still does not agree."""
    import families

    asked = sys.argv[1:] or list(REASONS)
    found = [each for family in asked for each in families.run([family], mended=True)]  # without other families' fixes
    print(families.table(found))
    sys.exit(0 if all(each.verdict == "works" for each in found) else 1)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
