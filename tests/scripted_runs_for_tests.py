"""Runs whose process is a few lines of Python instead of a training; as a program, makes them until it is stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from popo_lightning.compare.plan import Arm, PlannedRun
from popo_lightning.compare.runs import run_all

FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'summary.json').write_text('{}'); print('made')"
STOPPED = 7


class ScriptedRun(PlannedRun):
    """Its script is given the run's folder."""

    script = FINISH

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.folder)]


def scripted_run(folder: Path, script: str = FINISH, seed: int = 1) -> ScriptedRun:
    kind = type("OneScriptedRun", (ScriptedRun,), {"script": script})
    found: ScriptedRun = kind(Arm("popo"), seed, folder / f"popo-seed{seed}", (), ("--run.method=popo",))
    return found


if __name__ == "__main__":
    where, what = Path(sys.argv[1]), sys.argv[2]
    try:
        run_all([scripted_run(where, what), scripted_run(where, seed=2)], print, lambda run: "")
    except KeyboardInterrupt:
        os._exit(STOPPED)
