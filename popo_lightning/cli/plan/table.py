"""Formats the plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from popo_lightning.cli.plan.kept_checkpoints import on_disk
from popo_lightning.cli.plan.memory import GIB, Memory, Model, activation_bytes, head_weights, image_tokens
from popo_lightning.cli.plan.run_settings import DDP, FSDP, SERVERS, RunSettings

LAYOUTS = {DDP: "a whole model on each (DDP)", FSDP: "one model split over {shards}"}


def table(run: RunSettings, model: Model, memory: Memory, card: int | None) -> str:
    """The plan without the verdict.

    Args:
        run: Settings of the run.
        model: Model that is trained.
        memory: Estimated memory.
        card: Bytes of the card; None if there is none.
    """
    parts = {
        f"Plan of a run with {model.name}: an estimate, from settings and the model's configuration alone": _ranks(run),
        "Parameters": _parameters(run, model),
        "An iteration": _iteration(run, model),
        "Memory of a rank, always": _lines(memory.always),
        "Further, in the backward pass of a micro-batch": _backward(run, model, memory),
        "Further, in the optimizer step": _lines(memory.step),
        "Engine of a rank": _engine(run, memory),
        "Peaks of a rank": _peaks(memory, card),
        "Checkpoints": _checkpoints(run, memory),
        "Notes": [(note, "") for note in run.notes],
    }
    return "\n".join(_text(parts))


def size(count: float) -> str:
    """Formats bytes in a suitable unit."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _text(parts: dict[str, Iterable[tuple[str, str]]]) -> Iterator[str]:
    for title, lines in parts.items():
        found = list(lines)
        if found:
            yield title
            yield from (f"  {name:<52}{value:>20}".rstrip() for name, value in found)


def _ranks(run: RunSettings) -> Iterator[tuple[str, str]]:
    where = "GPUs" if run.on_gpu else "CPU processes"
    layout = LAYOUTS.get(run.layout, "").format(shards=run.shards)
    yield f"ranks, {where}{', ' if layout else ''}{layout}", f"{run.ranks}"


def _parameters(run: RunSettings, model: Model) -> Iterator[tuple[str, str]]:
    shape = model.architecture
    frozen = shape.parameters - shape.trained
    yield "trained", f"{shape.trained:,}"
    if frozen:
        yield f"frozen ({'beside adapters' if run.lora else 'vision tower'})", f"{frozen:,}"
    if run.has_reference:
        yield "reference", f"{shape.parameters:,}"
    if run.has_critic:
        yield "critic", f"{shape.critic + head_weights(run, shape):,}"


def _iteration(run: RunSettings, model: Model) -> Iterator[tuple[str, str]]:
    sequences = run.problems * run.group_size
    yield "problems x responses", f"{run.problems} x {run.group_size}"
    yield "minibatches x epochs", f"{run.minibatches} x {run.ppo_epochs}"
    yield "optimizer steps", f"{run.minibatches * run.ppo_epochs}"
    yield "sequences, and those of a rank", f"{sequences:,}, {run.rank_sequences:,}"
    tokens = sequences * run.sequence_tokens
    yield "tokens at most, and those of a rank", f"{tokens:,}, {run.rank_sequences * run.sequence_tokens:,}"
    yield "longest sequence, in tokens (prompt + response)", f"{run.sequence_tokens:,}"
    if images := image_tokens(run, model.architecture):
        yield "image tokens of a prompt at most", f"{images:,}"
    yield "padded tokens of a micro-batch at most", f"{run.pass_tokens:,}"
    yield "iterations", f"{run.iterations:,}" if run.iterations else "without end"


def _lines(parts: dict[str, int]) -> Iterator[tuple[str, str]]:
    yield from ((name, size(count)) for name, count in parts.items() if count)


def _backward(run: RunSettings, model: Model, memory: Memory) -> Iterator[tuple[str, str]]:
    yield from _lines(memory.backward)
    for checkpointing, word in ((False, "without"), (True, "with")):
        kept = sum(activation_bytes(run, model, checkpointing).values())
        yield f"all activations {word} gradient checkpointing", size(kept)


def _engine(run: RunSettings, memory: Memory) -> Iterator[tuple[str, str]]:
    engine = memory.engine
    if run.engine.kind == SERVERS:
        yield "servers apart from the trainer", "nothing here"
    if not engine.awake:
        return
    yield from _lines({"weights": engine.weights, "work of a step": engine.work, "cache": max(0, engine.cache)})
    yield f"sequences of {run.engine_tokens:,} tokens in the cache", f"{engine.sequences:,}"
    yield "while the trainer works", size(engine.resting)


def _peaks(memory: Memory, card: int | None) -> Iterator[tuple[str, str]]:
    for moment, count in memory.peaks.items():
        of_card = "" if card is None else f" ({count / card:.0%})"
        yield moment, size(count) + of_card
    if card is not None:
        yield "the card", size(card)


def _checkpoints(run: RunSettings, memory: Memory) -> Iterator[tuple[str, str]]:
    yield "one, without stored groups", size(memory.checkpoint)
    if (found := on_disk(run)) is not None:
        yield f"on the disk at most, of {found.kept} kept", size(found.at_once * memory.checkpoint)
