"""scripts/setup.sh checks a machine before it installs anything. A separate PATH fakes the commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.places import REPOSITORY
from packaging.requirements import Requirement

TOOLS = ("bash", "dirname", "head", "cat", "env")


class Machine:
    """A folder of commands that imitates a machine, with a GPU, a compiler, headers and room unless told otherwise."""

    def __init__(self, root: Path) -> None:
        self.bin, self.root = root / "bin", root
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        headers = root / "include"
        headers.mkdir()
        (headers / "Python.h").touch()
        self.gpu("580.65.06")
        self.command("gcc", "exit 0")
        self.system("Linux", "x86_64")
        self.free(500)
        self.python(headers)

    def command(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        file.chmod(0o755)

    def gpu(self, driver: str) -> None:
        self.command("nvidia-smi", f'case "$*" in -L) echo GPU 0 ;; *driver_version*) echo {driver} ;; esac')

    def system(self, name: str, processor: str) -> None:
        self.command("uname", f'case "$1" in -m) echo {processor} ;; *) echo {name} ;; esac')

    def free(self, gb: int) -> None:
        self.command("df", "exit 0")
        self.command("awk", f"echo {gb * 1000000000 // 1024 + 1}")

    def python(self, headers: Path) -> None:
        asks = f'case "$2" in *get_paths*) echo {headers} ;; *) exec {sys.executable} "$@" ;; esac'
        self.command("python3", asks)

    def without(self, name: str) -> None:
        (self.bin / name).unlink()

    def check(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("--check", **variables)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.root), "POPO_VENV": str(self.root / "venv"), **variables}
        script = REPOSITORY / "scripts" / "setup.sh"
        return subprocess.run(
            [str(self.bin / "bash"), str(script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refusal(machine: Machine, **variables: str) -> str:
    checked = machine.check(**variables)
    assert checked.returncode == 2, checked.stdout + checked.stderr
    lines = checked.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("setup: ") and checked.stdout == ""
    assert not (machine.root / "venv").exists()
    return lines[0]


def test_a_machine_with_a_gpu(machine: Machine) -> None:
    checked = machine.check()
    assert (checked.returncode, checked.stderr) == (0, "") and "device gpu" in checked.stdout


def test_a_machine_without(machine: Machine) -> None:
    for command in ("nvidia-smi", "gcc"):
        machine.without(command)
    machine.python(machine.root / "nowhere")
    checked = machine.check()
    assert (checked.returncode, checked.stderr) == (0, "") and "device cpu" in checked.stdout


def test_the_device_is_what_is_asked_for(machine: Machine) -> None:
    assert "device cpu" in machine.check(POPO_DEVICE="cpu").stdout
    assert "POPO_DEVICE is 'tpu'" in refusal(machine, POPO_DEVICE="tpu")
    machine.without("nvidia-smi")
    checked = machine.check(POPO_DEVICE="gpu")  # an image is built without a GPU
    assert checked.returncode == 0 and "not checked" in checked.stderr and "device gpu" in checked.stdout


def test_a_mac_is_set_up_without_vllm(machine: Machine) -> None:
    """vLLM has no wheel for a Mac, so the transformers engine samples."""
    assert "engine vLLM" in machine.check(POPO_DEVICE="cpu").stdout
    machine.without("nvidia-smi")
    machine.system("Darwin", "arm64")
    checked = machine.check()
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "device cpu" in checked.stdout and "engine transformers" in checked.stdout
    assert "needs Linux" in refusal(machine, POPO_DEVICE="gpu")


def test_machines_without_torch_or_posix_are_told_where_to_go(machine: Machine) -> None:
    machine.without("nvidia-smi")
    machine.system("Darwin", "x86_64")
    assert "no wheel for a Mac with an Intel processor" in refusal(machine)
    for windows in ("MINGW64_NT-10.0-22631", "MSYS_NT-10.0-22631", "CYGWIN_NT-10.0-22631"):
        machine.system(windows, "x86_64")
        sentence = refusal(machine)
        assert windows in sentence and "WSL" in sentence and "Dockerfile" in sentence


@pytest.mark.parametrize("driver", ["535.183.01", "575.57.08", "[N/A]"])
def test_an_old_driver(machine: Machine, driver: str) -> None:
    machine.gpu(f"'{driver}'")
    sentence = refusal(machine)
    assert driver in sentence and "580" in sentence and "POPO_DEVICE=cpu" in sentence
    assert machine.check(POPO_DEVICE="cpu").returncode == 0


def test_no_compiler(machine: Machine) -> None:
    machine.without("gcc")
    assert "install gcc or clang" in refusal(machine)
    assert "CC is 'nowhere'" in refusal(machine, CC="nowhere")
    machine.command("tcc", "exit 0")
    assert machine.check(CC="tcc -O1").returncode == 0


def test_no_headers(machine: Machine) -> None:
    machine.python(machine.root / "nowhere")
    sentence = refusal(machine)
    assert "nowhere/Python.h" in sentence and "python3-dev" in sentence


@pytest.mark.parametrize(("gb", "device", "enough"), [(14, "gpu", False), (16, "gpu", True), (5, "cpu", False)])
def test_disk(machine: Machine, gb: int, device: str, enough: bool) -> None:
    machine.free(gb)
    if enough:
        assert machine.check(POPO_DEVICE=device).returncode == 0
    else:
        sentence = refusal(machine, POPO_DEVICE=device)
        assert f"{gb} GB free" in sentence and "POPO_VENV" in sentence


def test_the_real_df_is_understood(machine: Machine) -> None:
    for tool in ("df", "awk"):
        (machine.bin / tool).unlink()
        (machine.bin / tool).symlink_to(str(shutil.which(tool)))
    free = shutil.disk_usage(machine.root).free / 1e9
    if abs(free - 6) < 0.5:
        pytest.skip(f"{free:.1f} GB are free here, too near to the limit to tell")
    assert machine.check(POPO_DEVICE="cpu").returncode == (0 if free > 6 else 2)


FAKE = """mkdir -p "$3/bin"
cat >"$3/bin/python" <<'PYTHON'
#!{bash}
echo "$*" >>{log}
case "$*" in
  scripts/pip_settings.py) {settings} ;;
  *"install --quiet uv "*) {uv} ;;
  *popo_lightning.cli.main*) {probe} ;;
esac
PYTHON
cat >"$3/bin/fake-uv" <<'UV'
#!{bash}
printf 'uv' >>{log}
for name in ${{!UV_*}}; do printf ' %s=<%s>' "$name" "${{!name}}" >>{log}; done
printf ' <%s>' "$@" >>{log}
echo >>{log}
{uv_end}
UV
chmod +x "$3/bin/python" "$3/bin/fake-uv"
"""


SETTINGS = "printf '%s\\n' UV_INDEX=https://user:secret@one/simple 'UV_FIND_LINKS=/a b'"


def fake_environment(
    machine: Machine, *, uv: str, uv_end: str = "exit 0", probe: str = "exit 0", settings: str = SETTINGS
) -> Path:
    """Fakes the environment's commands; returns the file that lists the commands they get."""
    log = machine.root / "calls"
    venv = machine.root / "venv" / "bin"
    installs = f"mv {venv}/fake-uv {venv}/uv" if uv == "installs" else uv
    make = FAKE.format(bash=shutil.which("bash"), log=log, uv=installs, uv_end=uv_end, probe=probe, settings=settings)
    machine.command("python3", f'if [ "$2" = venv ]; then\n{make}\nelse exec {sys.executable} "$@"; fi')
    for tool in ("mkdir", "chmod", "sed", "mv", "rm"):
        (machine.bin / tool).symlink_to(str(shutil.which(tool)))
    return log


@pytest.mark.parametrize(("system", "vllm"), [("Linux", True), ("Darwin", False)])
def test_what_is_installed_without_uv(machine: Machine, system: str, vllm: bool) -> None:
    """The environment's python is faked and lists the commands it gets."""
    machine.without("nvidia-smi")
    machine.system(system, "arm64" if system == "Darwin" else "x86_64")
    log = fake_environment(machine, uv="exit 1")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    calls, venv = log.read_text().splitlines(), machine.root / "venv"
    torch, package = (line for line in calls if " install " in line and "--quiet uv " not in line)
    constraints = REPOSITORY / "constraints" / "cpu.txt"
    if vllm:
        assert "torch==2.13.0+cpu --constraint constraints/cpu.txt" in torch
        assert "-c import popo_lightning.cli.main; from vllm import LLM" in calls
    else:
        constraints = venv / ".popo-constraints.txt"
        assert f"torch==2.13.0 --constraint {constraints}" in torch
        assert "-c import popo_lightning.cli.main" in calls and not any("vllm" in line for line in calls)
        assert "+cpu" not in constraints.read_text() and "\ntorch==2.13.0\n" in constraints.read_text()
    assert "-e .[cpu,dev] --constraint" in package
    assert (venv / ".popo-device").read_text() == "cpu\n"
    assert (venv / ".popo-engine").read_text() == ("vLLM\n" if vllm else "transformers\n")
    assert machine.run().stdout == "" and log.read_text().splitlines() == calls  # up to date


@pytest.mark.parametrize(("device", "torch"), [("cpu", ["torch==2.13.0+cpu"]), ("gpu", [])])
def test_uv_installs_everything_with_the_settings_of_pip(machine: Machine, device: str, torch: list[str]) -> None:
    log = fake_environment(machine, uv="installs")
    done = machine.run(POPO_DEVICE=device)
    assert (done.returncode, done.stderr) == (0, "")
    calls, venv = log.read_text().splitlines(), machine.root / "venv"
    words = ["pip", "install", "--quiet", "--python", f"{venv}/bin/python", *torch, "-e", f".[{device},dev]"]
    words += ["--constraint", f"constraints/{device}.txt"]
    variables = "UV_FIND_LINKS=</a b> UV_INDEX=<https://user:secret@one/simple>"
    assert [line for line in calls if line.startswith("uv ")] == [
        f"uv {variables} {' '.join(f'<{word}>' for word in words)}"
    ]
    (uv,) = [line for line in calls if "-m pip" in line and " install " in line]
    assert uv.endswith(f"install --quiet uv --constraint constraints/{device}.txt")


def test_pip_installs_what_uv_does_not_find(machine: Machine) -> None:
    machine.without("nvidia-smi")
    log = fake_environment(machine, uv="installs", uv_end="echo uv found nothing >&2; exit 1")
    done = machine.run()
    assert (done.returncode, done.stderr) == (0, "")
    calls = log.read_text().splitlines()
    first, second = (line for line in calls if line.startswith("uv "))
    assert "<--extra-index-url> <https://download.pytorch.org/whl/cpu>" not in first
    assert "<--extra-index-url> <https://download.pytorch.org/whl/cpu>" in second
    assert any("-m pip" in line and "-e .[cpu,dev]" in line for line in calls)


def test_packages_that_do_not_import_are_no_environment(machine: Machine) -> None:
    fake_environment(machine, uv="installs", probe="echo 'ImportError: libnuma.so.1' >&2; exit 1")
    done = machine.run()
    assert done.returncode == 2
    error, sentence = done.stderr.splitlines()
    assert error == "ImportError: libnuma.so.1" and sentence.startswith("setup: ") and "POPO_VENV" in sentence
    assert not (machine.root / "venv" / ".popo-stamp").exists()


def test_pip_installs_where_its_settings_cannot_be_told_to_uv(machine: Machine) -> None:
    machine.without("nvidia-smi")
    log = fake_environment(machine, uv="installs", settings="exit 1")
    assert machine.run().returncode == 0
    calls = log.read_text().splitlines()
    assert not any(line.startswith("uv ") for line in calls) and any("-e .[cpu,dev]" in line for line in calls)


def test_the_cache_of_uv_fills_no_other_disk(machine: Machine) -> None:
    log = fake_environment(machine, uv="installs")
    machine.command("awk", 'read -r _; read -r disk; case "$*" in *\'$4\'*) echo 999999999 ;; *) echo "$disk" ;; esac')
    machine.command("df", f'echo Filesystem; case "$2" in {machine.root}/venv*) echo /dev/b ;; *) echo /dev/a ;; esac')
    done = machine.run(POPO_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"UV_CACHE_DIR=<{machine.root}/venv/.uv-cache>" in log.read_text()


def test_settings_of_pip_as_variables_of_uv() -> None:
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        import pip_settings
    finally:
        sys.path.pop(0)
    listing = """:env:.find-links='/wheels /more'
:env:.cert='/certificates.crt'
freeze.timeout='10'
global.constraint='/constraints.txt'
global.extra-index-url='https://one/simple https://two/simple'
global.find-links='/elsewhere'
global.index-url='https://global/simple'
install.index-url='https://install/simple'
global.trusted-host='one'
"""
    best = "UV_INDEX_STRATEGY=unsafe-best-match"
    assert pip_settings.variables({}) == [best]
    assert pip_settings.variables(pip_settings.settings(listing)) == [
        best,
        "UV_DEFAULT_INDEX=https://install/simple",
        "UV_INDEX=https://one/simple https://two/simple",
        "UV_FIND_LINKS=/wheels,/more",
        "UV_CONSTRAINT=/constraints.txt",
        "UV_INSECURE_HOST=one",
        "SSL_CERT_FILE=/certificates.crt",
    ]
    with pytest.raises(ValueError, match="require-hashes"):
        pip_settings.variables(pip_settings.settings("install.require-hashes='true'"))


def test_vllm_is_declared_for_linux_alone() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for device in ("cpu", "gpu"):
        (vllm,) = [Requirement(one) for one in extras[device] if one.startswith("vllm")]
        assert vllm.marker is not None
        assert vllm.marker.evaluate({"sys_platform": "linux"}) and not vllm.marker.evaluate({"sys_platform": "darwin"})
