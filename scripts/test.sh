#!/usr/bin/env bash
# Sets up, then lint, types and tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" popo_lightning
# On a CPU two processes share the quick tests, file by file; the slow ones start processes of their own. On a GPU each
# vLLM engine wants most of the card, so there is one.
if [ $# = 0 ] && [ "$(cat "${POPO_VENV:-.venv}/.popo-device")" = cpu ]; then set -- -n 2 --dist loadfile; fi
"$bin/python" -m pytest "$@"
