"""Starts programs in processes forked from a server that has imported the libraries, which takes six seconds each."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import torch
from lightning.pytorch.utilities import rank_zero_only

PRELOADED = [
    "popo_lightning.cli.main",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "tensorboard.plugins.hparams.plugin_data_pb2",
    "vllm.entrypoints.llm",
]


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Returns the context that starts processes. Its server starts with the first of them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver")


def run_forked(
    program: Sequence[str | Path],
    environment: Mapping[str, str],
    ranks: int | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> CompletedProcess[str]:
    """Runs a Python program like subprocess.run, with what it prints as text.

    Args:
        program: Arguments of python: -m and a module, or a script, and its arguments.
        environment: Its whole environment. Most variables that a library reads when it is imported have no effect.
        ranks: Number of processes, each with the variables that torchrun gives it. None starts one without them.
        cwd: Its working directory.
        timeout: Seconds until it is killed.

    Raises:
        subprocess.TimeoutExpired: It ran too long.
    """
    words = [str(word) for word in program]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        for file in said:
            file.touch()
        places = [{}] if ranks is None else variables_of(ranks)
        started = [
            fork_server().Process(target=_run, args=(words, dict(environment) | more, str(cwd or Path.cwd()), *said))
            for more in places
        ]
        for process in started:
            process.start()
        code = _wait(started, time.monotonic() + timeout)
        out, err = (file.read_text(errors="replace") for file in said)
    if code is None:
        raise TimeoutExpired(words, timeout, out, err)
    return CompletedProcess(words, code, out, err)


def variables_of(ranks: int) -> list[dict[str, str]]:
    """Returns the variables of each rank on one node, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def take_environment(environment: Mapping[str, str]) -> None:
    """Gives a forked process its variables, and sets what torch and Lightning read from them when imported."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    rank_zero_only.rank = int(environment.get("RANK", 0))


def _wait(started: Sequence[ForkServerProcess], deadline: float) -> int | None:
    """Returns the exit code of the first process that failed, else 0, and None after the deadline.

    Like torchrun, it ends the other processes if one has failed.
    """
    codes: list[int | None] = [None]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        multiprocessing.connection.wait([p.sentinel for p in started if p.exitcode is None], timeout=1)
        codes = [process.exitcode for process in started]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in started:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid or 0, number)
                process.join(timeout=10)
    return next(filter(None, codes), None if None in codes else 0)


def _run(words: Sequence[str], environment: Mapping[str, str], cwd: str, out: Path, err: Path) -> None:
    os.setsid()
    for number, file in ((1, os.open(out, os.O_WRONLY | os.O_APPEND)), (2, os.open(err, os.O_WRONLY | os.O_APPEND))):
        os.dup2(file, number)
    take_environment(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # of a process started from a shell
    sys.path[:0] = [cwd, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent.resolve())
            runpy.run_path(words[0], run_name="__main__")
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()  # a forked process would leave them out
