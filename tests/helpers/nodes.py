"""Two nodes on one machine: network namespaces joined by a virtual cable, with torchrun across them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.forked import run_forked
from helpers.tiny_models import environment

NETWORK = "10.77.0"


class TwoNodes:
    """Two network namespaces that are connected only to each other, by a pair of virtual interfaces.

    Raises:
        PermissionError: This user may not create network namespaces.
    """

    def __init__(self) -> None:
        self.names = [f"popo{os.getpid()}n{node}" for node in range(2)]
        self.interfaces = [f"pp{os.getpid()}n{node}" for node in range(2)]
        self._commands: list[subprocess.Popen[str]] = []

    def join(self) -> None:
        try:
            for name in self.names:
                _ip("netns", "add", name)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise PermissionError("network namespaces cannot be made here") from error
        _ip("link", "add", self.interfaces[0], "type", "veth", "peer", "name", self.interfaces[1])
        for node, (name, interface) in enumerate(zip(self.names, self.interfaces, strict=True)):
            _ip("link", "set", interface, "netns", name)
            _ip("-n", name, "addr", "add", f"{NETWORK}.{node + 1}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def part(self) -> None:
        for command in self._commands:
            if command.poll() is None:
                command.kill()
                command.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def start(self, *arguments: str | Path) -> list[subprocess.Popen[str]]:
        """Starts popo fit on both nodes with one rank each, with FSDP2 over gloo."""
        started = []
        for node, name in enumerate(self.names):
            launcher = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
            launcher += ["--master-addr", f"{NETWORK}.1", "--master-port", "29541"]
            address = {"GLOO_SOCKET_IFNAME": self.interfaces[node], "VLLM_HOST_IP": f"{NETWORK}.{node + 1}"}
            command = ["ip", "netns", "exec", name, *torchrun(launcher, 1, 2, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=environment() | address, **pipes))  # type: ignore[call-overload]
        self._commands += started
        return started

    def run(self, *arguments: str | Path, seconds: float) -> list[str]:
        """Runs :meth:`start`, which must succeed, and returns the output of each node."""
        started = self.start(*arguments)
        printed = [command.communicate(timeout=seconds)[0] for command in started]
        assert [command.returncode for command in started] == [0, 0], "\n".join(text[-4000:] for text in printed)
        return printed


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Joins two nodes for the time of a test, then removes them and kills what still runs in them."""
    nodes = TwoNodes()
    try:
        nodes.join()
        yield nodes
    finally:
        nodes.part()


def one_node(ranks: int, *arguments: str | Path, seconds: float) -> str:
    """Runs the popo command, which must succeed, on several ranks of this machine. Returns their error stream."""
    command = ["-m", "popo_lightning", *arguments, "--trainer.devices", str(ranks)]
    finished = run_forked(command, environment(), ranks, timeout=seconds)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return finished.stderr


def torchrun(launcher: list[str], devices: int, ranks: int, arguments: tuple[str | Path, ...]) -> list[str]:
    """Returns the command of one node."""
    start = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "popo_lightning"]
    nodes = ["--trainer.devices", str(devices), "--trainer.num_nodes", str(ranks // devices)]
    return [*start, *map(str, arguments), *fsdp2(ranks, whole_checkpoints=True), *nodes]


def fsdp2(ranks: int, whole_checkpoints: bool) -> list[str]:
    """Returns the settings of popo fit for FSDP2."""
    strategy = ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"]
    strategy += ["--trainer.strategy.data_parallel_size", str(ranks), "--trainer.strategy.tensor_parallel_size", "1"]
    return [*strategy, "--trainer.strategy.save_distributed_checkpoint", str(not whole_checkpoints).lower()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
