"""Sentences printed when everything is loaded: where the run writes, what it resumes from, and its method."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lightning as L
import torch

from popo_lightning.model.policy_model import policy_of
from popo_lightning.rollout.engine_rollouts import rollouts_of
from popo_lightning.runs.start import Start
from popo_lightning.runs.wanted_run import RunSettings


def opening_sentences(start: Start, trainer: L.Trainer, method: str) -> Iterator[str]:
    """Sentences for the beginning of a run, whose method is the setting run.method."""
    yield from start.news
    if start.checkpoint is not None and start.behind is not None and not start.forks:
        done, most = start.behind.iterations, trainer.max_epochs
        of_all = f" of {most}" if most is not None and most > 0 else ""
        inside = f", inside iteration {start.behind.begun}" if start.behind.begun > done else ""
        yield f"continues from '{start.checkpoint}', after {done}{of_all} iterations{inside}"
    yield f"writes to '{start.folder}'"
    if (busy := other_work(trainer.strategy.root_device.type)) is not None:
        yield busy
    if method == RunSettings.method:
        yield f"no method is named (--config method/NAME), so the method is the defaults: {parts(trainer)}"


def other_work(device: str) -> str | None:
    """The sentence for a CPU that trains and that other processes occupy; None if they do not.

    Threads of one operation wait for the slowest, so beside other work they can be many times slower than one thread.
    """
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    try:
        load = os.getloadavg()[0]
    except OSError:  # not known here
        return None
    if device != "cpu" or threads == 1 or load < cores:
        return None
    return (
        f"this machine is busy (a load of {load:.1f} on {cores} cores), and {threads} threads would wait for each "
        "other; OMP_NUM_THREADS=1 may be many times faster"
    )


def parts(trainer: L.Trainer) -> str:
    """Names the classes that make up the method, by the settings that choose them."""
    policy = policy_of(trainer.lightning_module)
    data = rollouts_of(trainer)
    objective = policy.objective
    slots = {
        "data.composer": data.composer,
        "model.advantage": policy.advantage,
        "model.behave_weight": objective.behave_weight,
        "model.trust_region": objective.trust_region,
    }
    return ", ".join(f"{name} {type(part).__name__}" for name, part in slots.items())
