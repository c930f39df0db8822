"""Runs whose process is a short Python script instead of a training. As a program, it makes such runs until stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from popo_lightning.cli.compare.plan import Arm, PlannedRun
from popo_lightning.cli.compare.runs import run_all

FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'summary.json').write_text('{}'); print('made')"
STOPPED = 7


class ScriptedRun(PlannedRun):
    """A run whose script gets the run's folder as its argument."""

    script = FINISH

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.folder)]


def scripted_run(folder: Path, script: str = FINISH, seed: int = 1) -> ScriptedRun:
    kind = type("OneScriptedRun", (ScriptedRun,), {"script": script})
    found: ScriptedRun = kind(Arm("popo"), seed, folder / f"popo-seed{seed}", (), ("--run.method=popo",))
    return found


if __name__ == "__main__":
    where, what, at_once, other = Path(sys.argv[1]), sys.argv[2], *[*sys.argv[3:], "1", FINISH][:2]
    try:
        runs = [scripted_run(where, what), scripted_run(where, other, seed=2)]
        run_all(runs, print, lambda run: "", int(at_once))
    except KeyboardInterrupt:
        os._exit(STOPPED)
