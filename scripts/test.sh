#!/usr/bin/env bash
# Sets up, then runs lint, types and tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
export PYTHONDONTWRITEBYTECODE= # the tests start some hundred interpreters, each of which would compile again
# On a CPU two processes share the quick tests: each gets half of the files, in order, and the first to finish takes over
# the other's remaining files. Slow tests start processes of their own. On a GPU each vLLM engine needs most of the card,
# so there is only one process.
if [ $# = 0 ] && [ "$(cat "${POPO_VENV:-.venv}/.popo-device")" = cpu ]; then set -- -n 2 --dist worksteal; fi
"$bin/python" -m pytest "$@"
