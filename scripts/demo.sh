#!/usr/bin/env bash
# Trains POPO and GRPO on the embedded Countdown task with the same seed and budget, and compares them.
# SEED (1) and ITERATIONS (that of the task) may be set. Further arguments go to both runs.
# On two cores or more they run side by side, a core each; Ctrl-C stops both where they can be continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
seed=${SEED:-1}
root=runs/demo-$(date +%Y%m%d-%H%M%S)
settings=(--config task/countdown_tiny --seed_everything "$seed" --run.root "$root")
if [ -n "${ITERATIONS:-}" ]; then settings+=(--trainer.max_epochs "$ITERATIONS"); fi
mkdir -p "$root"
set -m # so that Ctrl-C comes to this script alone, which passes it on
trap 'kill -INT $(jobs -p) 2>/dev/null || true' INT TERM
failed=0
waited() { # for a job, and again where a signal came in between
  while kill -0 "$1" 2>/dev/null; do wait "$1" && return 0 || code=$?; done
  return "${code:-0}"
}
start() { # a method in the background; its lines come with its name before them
  "$bin/popo" fit "${settings[@]}" --config "method/$1" "${@:2}" >"$root/$1.log" 2>&1 &
  job=$!
  { tail -n +1 -f --pid="$job" "$root/$1.log" | sed -u "s/^/$1  /"; } &
  shown=$!
}
if [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ]; then
  export OMP_NUM_THREADS=1
  start popo "$@"; popo=$job; popo_shown=$shown
  start grpo "$@"; grpo=$job; grpo_shown=$shown
  waited "$popo" || failed=$?
  waited "$grpo" || failed=$?
  wait "$popo_shown" "$grpo_shown" || true
else
  for method in popo grpo; do
    start "$method" "$@"
    waited "$job" || { failed=$?; wait "$shown" || true; break; }
    wait "$shown" || true
  done
fi
if [ "$failed" -ne 0 ]; then exit "$failed"; fi
"$bin/python" scripts/demo_report.py "$root"
