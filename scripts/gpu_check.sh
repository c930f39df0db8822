#!/usr/bin/env bash
# Runs all checks that need a GPU, in less than eight minutes: see scripts/gpu_check.py.
# bash scripts/gpu_check.sh OUT_FOLDER [STATE_FOLDER] [--parts a b ...]; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3); fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" scripts/gpu_check.py "$@"
