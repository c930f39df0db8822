"""Why vLLM's CPU build computes some families otherwise than their files say.

    python scripts/vllm_faults.py     # each of those families again, with vLLM's fault mended: it must agree

A configuration that is too small could be at fault as well as vLLM. So each reason names one piece of vLLM's code, and
with that piece alone mended, in the memory of one process, the same model agrees with the trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

ROTARY = "rotates heads wrongly where they have an axis of their own (its kernel of rotary embeddings)"
ROUTER = "scores experts that are not in groups by softmax alone, and leaves out their router's bias"

# By family, in a sentence that begins with "vLLM"; what mends it is in MENDED.
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
    """Plain torch in the place of the kernel."""
    from vllm.model_executor.layers.rotary_embedding import base, deepseek_scaling_rope

    for module in (base, deepseek_scaling_rope):
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and kind.__module__ == module.__name__ and "forward_cpu" in vars(kind):
                setattr(kind, "forward_cpu", getattr(kind, "forward_native"))  # noqa: B009, B010


def mend_router() -> None:
    """Experts by their scores and the bias; weights by the scores alone."""
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
    """The head's bias is added."""
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
    """Mends in this process what one family needs; call it before the family's model is loaded."""
    for each in MENDED[family]:
        each()


def main() -> None:
    """The command: exit code 1 where a family does not agree for all that."""
    import families

    asked = sys.argv[1:] or list(REASONS)
    found = [each for family in asked for each in families.run([family], mended=True)]  # no fault of another is mended
    print(families.table(found))
    sys.exit(0 if all(each.verdict == "works" for each in found) else 1)


if __name__ == "__main__":
    main()
