"""Says whether a run fits its GPU, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, floor

from popo_lightning.cli.plan.memory import GIB, Memory, Model, estimate
from popo_lightning.cli.plan.run_settings import FSDP, TRANSFORMERS, VLLM, RunSettings

SHARE_STEP = 0.01

# Gives a setting with its new value and the run that has it, which is the same run if there is nothing to change.
Remedy = Callable[[RunSettings, Model, int], tuple[str, RunSettings]]


def objection(run: RunSettings, model: Model, card: int | None) -> str | None:
    """One sentence about what does not fit, with the settings that help, the cheapest first; None if all fits.

    Args:
        run: Settings of the run.
        model: Model that is trained.
        card: Bytes of the card; None compares nothing with it.
    """
    memory = estimate(run, model, card)
    over = {moment: size for moment, size in memory.peaks.items() if card is not None and size > card}
    if card is None or not over:
        return _cache_objection(run, memory)
    needs = " and ".join(f"{size / GIB:.1f} GiB for {moment}" for moment, size in over.items())
    return (
        f"the run does not fit a card of {card / GIB:.4g} GiB, which would have to have about {needs}; "
        f"{_advice(run, model, card)}"
    )


def _cache_objection(run: RunSettings, memory: Memory) -> str | None:
    """Objects to a cache that holds no sequence, since vLLM does not start with it."""
    if memory.engine.sequences != 0:
        return None
    setting, value = (
        ("gpu_memory_utilization", run.engine.share) if run.on_gpu else ("cpu_cache_gib", run.engine.cpu_cache / GIB)
    )
    room = max(0, memory.engine.cache) / GIB
    return (
        f"data.engine.{setting} is {value:g}, which leaves {room:.2f} GiB for the engine's cache, too little for a "
        f"sequence of {run.engine_tokens} tokens; raise it, or lower data.max_new_tokens"
    )


def _advice(run: RunSettings, model: Model, card: int) -> str:
    taken: list[Remedy] = []
    now = run
    for remedy in REMEDIES:
        _, changed = remedy(now, model, card)
        if _lacking(changed, model, card) < _lacking(now, model, card):
            taken, now = [*taken, remedy], changed
        if not _lacking(now, model, card):
            break
    else:
        return "no setting of it is enough; use larger cards, more of them with FSDP2, or a smaller model"
    for remedy in list(taken):  # drops those that a later one makes needless
        fewer = [other for other in taken if other is not remedy]
        if not _lacking(_after(run, fewer, model, card)[0], model, card):
            taken = fewer
    return f"set {' and '.join(_after(run, taken, model, card)[1])}"


def _after(run: RunSettings, remedies: Sequence[Remedy], model: Model, card: int) -> tuple[RunSettings, list[str]]:
    """Applies remedies; returns the run and what they set."""
    words = []
    for remedy in remedies:
        setting, changed = remedy(run, model, card)
        if changed != run:
            words.append(setting)
            run = changed
    return run, words


def _lacking(run: RunSettings, model: Model, card: int) -> int:
    """Bytes over the card, summed over the peaks, plus 1 for a cache that holds no sequence."""
    memory = estimate(run, model, card)
    return sum(max(0, size - card) for size in memory.peaks.values()) + (memory.engine.sequences == 0)


def _smaller_share(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    """Lowers vLLM's share to the largest that leaves room for the rest, or the smallest that still holds a sequence."""
    memory = estimate(run, model, card)
    without = sum(memory.always.values())
    if run.engine.sleep_level == 0:
        without = max(memory.peaks.values()) - memory.engine.awake
    share = floor((card - without) / card / SHARE_STEP) * SHARE_STEP
    least = ceil((memory.engine.weights + memory.engine.work + memory.engine.sequence) / card / SHARE_STEP) * SHARE_STEP
    share = round(max(share, least), 2)
    if run.engine.kind != VLLM or not 0 < share < run.engine.share:
        share = run.engine.share
    return f"data.engine.gpu_memory_utilization to {share:g}", replace(run, engine=replace(run.engine, share=share))


def _fewer_responses(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    """Halves the batch size as often as it helps."""
    batch, now = min(run.engine.batch_size, run.rank_sequences), run
    while run.engine.kind == TRANSFORMERS and batch > 1 and _lacking(now, model, card):
        batch //= 2
        now = replace(run, engine=replace(run.engine, batch_size=batch))
    return f"data.engine.batch_size to {batch}", now


def _fewer_tokens(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    """Halves the token budget as often as it helps; it still holds a whole sequence."""
    tokens, now = run.micro_batch_tokens, run
    while tokens // 2 >= run.sequence_tokens and _lacking(now, model, card):
        tokens //= 2
        now = replace(run, micro_batch_tokens=tokens)
    return f"model.micro_batch_tokens to {tokens}", now


def _checkpointing(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    return "model.gradient_checkpointing to true", replace(run, gradient_checkpointing=True)


def _sleep(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    level = run.engine.sleep_level or 2
    return f"data.engine.sleep_level to {level}", replace(run, engine=replace(run.engine, sleep_level=level))


def _shard_gradients(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    return "model.gradient_sync to micro_batch", replace(run, gradients_held_whole=False)


def _shard(run: RunSettings, model: Model, card: int) -> tuple[str, RunSettings]:
    sharded = replace(run, layout=FSDP if run.ranks > 1 else run.layout)
    return "trainer.strategy to ModelParallelStrategy (FSDP2, as configs/scale/fsdp2.yaml does)", sharded


REMEDIES: Sequence[Remedy] = (
    _smaller_share,
    _fewer_responses,
    _fewer_tokens,
    _checkpointing,
    _sleep,
    _shard_gradients,
    _shard,
)
