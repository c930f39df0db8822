"""Compares engine and trainer on model families, with untrained models that fit a CPU.

    python scripts/families.py                         # all families, about ten minutes on a core
    python scripts/families.py qwen3_moe falcon_h1     # some of them again; the rows of the others stay

Both write benchmarks/families.json and, from it, benchmarks/families.md. --only-show writes neither.

For each family a small random model is saved, vLLM and the trainer load it, and both compute the log-probs of the same
sampled tokens: as loaded, after a sync of unchanged weights, and after an optimizer step that moves every weight and a
sync. A family that the package itself refuses is in the table with the sentence. Families run one after the other in a
process, and a failure ends the process, so that its leftovers do not affect the next family.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TABLE, RESULTS = (REPOSITORY / "benchmarks" / name for name in ("families.md", "families.json"))
TOLERANCE = 2e-4  # nats, maximum over all tokens, in float32
FLOORS = 3  # times the difference as loaded, if that is more
MOVED = 0.01  # minimum change of log-probs by the step; otherwise agreement would prove nothing
SECONDS = 300  # maximum per family, on average over those that share a process


@dataclass
class Found:
    """Results of one family: largest differences in nats, and the package's refusal."""

    family: str
    kind: str
    loaded: float | None = None
    synced: float | None = None
    moved: float | None = None
    stepped: float | None = None
    sentence: str = ""
    failure: str = ""

    @property
    def verdict(self) -> str:
        """Returns works, refused, or broken (neither of the two)."""
        if self.failure:
            return "broken"
        if self.sentence:
            return "refused"
        if self.loaded is None or self.synced is None or self.stepped is None or self.moved is None:
            return "broken"
        most = max(TOLERANCE, FLOORS * self.loaded)
        agrees = self.synced < most and self.stepped < most
        return "works" if agrees and self.moved > MOVED else "broken"


def examine(family: str, kind: str) -> Found:
    """Compares engine and trainer on one family, in this process."""
    import torch
    from tiny_families import make

    from popo_lightning.core.errors import SettingError
    from popo_lightning.engines.vllm.engine import VLLMEngine

    torch.set_num_threads(1)
    found = Found(family, kind)
    engine = VLLMEngine(cpu_cache_gib=0.25)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = make(family, Path(scratch) / family)
            _compare(found, folder, engine)
        except SettingError as error:
            found.sentence = str(error).replace(str(Path(scratch) / family), family)
        except Exception as error:
            found.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if not found.sentence and not found.failure:
        engine.stop()
    return found


def _compare(found: Found, folder: Path, engine: Any) -> None:
    import lightning as L
    import torch
    from tiny_families import prompts

    from popo_lightning.core.minibatch import Minibatch
    from popo_lightning.core.timing import PhaseClock
    from popo_lightning.engines.base import EngineContext, Sampling
    from popo_lightning.model.prompts import PromptEncoder
    from popo_lightning.policy import PolicyModule
    from popo_lightning.rollout.engine_gap import EngineCheck, GapLimits, gaps_of
    from popo_lightning.rollout.generation import RolloutGenerator

    policy: Any = PolicyModule(path=str(folder))
    policy.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    policy.configure_model()
    encoder, problems = PromptEncoder(folder, 300), prompts(folder)
    images = max(len(problem.images) for problem in problems)
    engine.start(
        EngineContext(
            folder,
            torch.device("cpu"),
            torch.float32,
            rank=0,
            world_size=1,
            max_tokens=400,
            forbidden_token_ids=policy.forbidden_token_ids,
            images_per_prompt=images,
            as_saved=policy.as_saved,
        )
    )
    nobody: Any = None
    generator = RolloutGenerator(encoder, engine, nobody, PhaseClock(), 0, 1, torch.float32, None)
    last: list[Minibatch] = []

    def sample() -> None:
        last[:] = [Minibatch(generator.ungraded(problems, 4, Sampling(16), seed=7), 0, 0)]

    def gap() -> float:
        return max(float(each.max()) for each in gaps_of(last[0], policy))

    def measured() -> float:
        sample()
        return gap()

    check = EngineCheck(measured, GapLimits(), policy, type(engine).__name__)
    check.loaded()
    found.loaded = check.floor
    engine.update_weights(policy.named_weights(), 0)
    check.synced()
    found.synced = gap()
    _step(policy, last[0])
    found.moved = gap()
    engine.update_weights(policy.named_weights(), 1)
    sample()
    found.stepped = gap()


def _step(policy: Any, minibatch: Any) -> None:
    """Takes a step of Adam towards less likely responses; the sign of a gradient moves every weight that has one."""
    import torch

    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for part in policy._passes(minibatch, minibatch.rows()):
        logp, _ = policy(part)
        logp.sum().backward()
    without = [name for name, parameter in policy.model.named_parameters() if parameter.grad is None]
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # experts without a token, and weights without a gradient
        for name, parameter in policy.model.named_parameters():
            if name in without:
                parameter.mul_(1.1)
            else:
                parameter.mul_(1.01)


# -- processes -------------------------------------------------------------------------------------------------


def run(families: Sequence[str], mended: bool = False) -> Iterator[Found]:
    """Examines families in separate processes, with a new process after every failure.

    Args:
        families: Model types of transformers.
        mended: Whether vLLM's faults that scripts/vllm_faults.py knows are fixed.
    """
    from tiny_families import FAMILIES

    waiting = list(families)
    while waiting:
        ended = False
        for found in _worker(waiting, mended):
            waiting.remove(found.family)
            ended = found.verdict != "works"
            yield found
        if waiting and not ended:
            yield Found(waiting[0], FAMILIES[waiting[0]][0], failure="its process ended without a word")
            del waiting[0]


def _worker(families: Sequence[str], mended: bool = False) -> Iterator[Found]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
    command = [sys.executable, __file__, "--worker", *(["--mended"] if mended else []), *families]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=nowhere, text=True, env=environment) as process:
        assert process.stdout is not None
        late = threading.Timer(SECONDS * len(families), process.kill)
        late.start()
        try:
            for line in process.stdout:
                if line.startswith('{"family"'):
                    yield Found(**json.loads(line))
        finally:
            late.cancel()
            process.kill()


def work(families: Sequence[str], mended: bool = False) -> None:
    """Writes a line of JSON for each family, and ends after the first that does not work."""
    from tiny_families import FAMILIES
    from vllm_faults import mend

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported
    for family in families:
        if mended:
            mend(family)
        found = examine(family, FAMILIES[family][0])
        print(json.dumps(asdict(found)), flush=True)
        if found.verdict != "works":
            os._exit(0)  # vLLM's leftovers would affect the next family


# -- the table -------------------------------------------------------------------------------------------------


def table(every: Sequence[Found]) -> str:
    """Table in Markdown."""
    lines = [
        "| family | kind | as loaded | after a sync | after a step and a sync | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in every:
        gaps = " | ".join("" if gap is None else f"{gap:.1e}" for gap in (found.loaded, found.synced, found.stepped))
        said = (found.sentence or found.failure).replace("|", "/")
        lines.append(f"| {found.family} | {found.kind} | {gaps} | {found.verdict}{': ' if said else ''}{said} |")
    return "\n".join(lines) + "\n"


def page(every: Sequence[Found]) -> str:
    """Writes benchmarks/families.md."""
    from importlib.metadata import version

    counts = {verdict: sum(found.verdict == verdict for found in every) for verdict in ("works", "refused", "broken")}
    installed = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    import vllm
    from tiny_families import FAMILIES

    left = [family for family in FAMILIES if family not in {found.family for found in every}]
    missing = f"\nNot examined yet: {', '.join(left)}.\n" if left else ""
    return f"""# Model families

`python scripts/families.py` writes this page. {installed}, vLLM {vllm.__version__}, on a CPU, in float32.

Each family is an untrained model of about 0.1M parameters, in which no parameter is as it was made. vLLM samples, and
the trainer computes the log-probs of the same tokens; the columns are the largest difference of all tokens in nats:
with the files as both load them, after unchanged weights went from trainer to vLLM, and after an optimizer step that
moved every weight. "works" needs what a run needs to begin, the other two below {TOLERANCE:g} (or {FLOORS} times the
first), and a step that moved log-probs by more than {MOVED:g}. "refused" is what a run says, before it trains, and ends
with. {counts["works"]} work, {counts["refused"]} are refused, {counts["broken"]} are neither.

A family that is refused on a CPU may work on a GPU, where vLLM has other kernels: the same comparison is made at the
start of every run. `data.engine` TransformersEngine samples those whose layers keep keys and values.
{missing}
{table(every)}
## Faults of vLLM behind a refusal

`python scripts/vllm_faults.py` makes the same comparison with that piece of vLLM's code alone mended: each of these
families then works. What the other refused families lack stands in their sentence.

{faults(every)}"""


def faults(every: Sequence[Found]) -> str:
    """List in Markdown of refused families whose sentence alone does not say why."""
    from vllm_faults import REASONS

    refused = [found.family for found in every if found.verdict == "refused"]
    return "".join(f"- {family}: vLLM {REASONS[family]}.\n" for family in refused if family in REASONS)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types of transformers; all without any")
    parser.add_argument("--only-show", action="store_true", help="leave the files as they are")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mended", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]
    from tiny_families import FAMILIES

    if arguments.worker:
        work(arguments.families, arguments.mended)
        return
    for found in run(arguments.families or list(FAMILIES)):
        print(table([found]).splitlines()[-1], flush=True)
        if not arguments.only_show:
            known = {} if not RESULTS.exists() else json.loads(RESULTS.read_text())
            known[found.family] = asdict(found)
            RESULTS.write_text(json.dumps({name: known[name] for name in FAMILIES if name in known}, indent=1) + "\n")
            TABLE.write_text(page([Found(**known[name]) for name in FAMILIES if name in known]))


if __name__ == "__main__":
    main()
