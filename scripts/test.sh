#!/usr/bin/env bash
# Sets up, then lint, types and tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" popo_lightning
# Two processes share the quick tests, file by file; the slow ones start processes of their own.
if [ $# = 0 ]; then set -- -n 2 --dist loadfile; fi
"$bin/python" -m pytest "$@"
