#!/usr/bin/env bash
# Sets up, then lint, types and tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" popo_lightning
"$bin/python" -m pytest "$@"
