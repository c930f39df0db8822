"""Two nodes on one machine: network namespaces joined by a virtual cable, and torchrun across them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_models import REPOSITORY

STRATEGY = "lightning.pytorch.strategies.ModelParallelStrategy"
NETWORK = "10.77.0"


class TwoNodes:
    """Two network namespaces that see each other, and nothing else, through a pair of virtual interfaces.

    Raises:
        PermissionError: This user may not make them.
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
        """popo fit on both nodes, a rank each, with FSDP2 over gloo."""
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
        """As :meth:`start`, to a good end; what each node printed."""
        started = self.start(*arguments)
        printed = [command.communicate(timeout=seconds)[0] for command in started]
        assert [command.returncode for command in started] == [0, 0], "\n".join(text[-4000:] for text in printed)
        return printed


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Joined for the time of a test, then gone with whatever still runs in them."""
    nodes = TwoNodes()
    try:
        nodes.join()
        yield nodes
    finally:
        nodes.part()


def torchrun(launcher: list[str], devices: int, ranks: int, arguments: tuple[str | Path, ...]) -> list[str]:
    """The command of one node."""
    strategy = ["--trainer.strategy", STRATEGY, "--trainer.devices", str(devices)]
    strategy += ["--trainer.num_nodes", str(ranks // devices), "--trainer.strategy.tensor_parallel_size", "1"]
    strategy += ["--trainer.strategy.data_parallel_size", str(ranks)]
    strategy += ["--trainer.strategy.save_distributed_checkpoint", "false"]
    start = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "popo_lightning"]
    return [*start, *map(str, arguments), *strategy]


def environment() -> dict[str, str]:
    """In which a node's processes find this repository and the tests' classes."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
