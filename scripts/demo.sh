#!/usr/bin/env bash
# Trains POPO and GRPO on the embedded Countdown task with the same seed and budget, and compares them.
# SEED (default 1) and ITERATIONS (default: the task's) may be set. Further arguments go to both runs.
# On two cores or more the runs are side by side on a core each. Ctrl-C stops both at a resumable point, and the last
# line is the command that continues them: DEMO names the folder of the demo to continue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
  case $argument in
    --run.root* | --run.folder*)
      echo "demo: $argument would part the runs from their table; name the demo's folder by DEMO=FOLDER instead" >&2
      exit 2
      ;;
  esac
done
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
seed=${SEED:-1}
root=${DEMO:-runs/demo-$(date +%Y%m%d-%H%M%S)}
settings=(--config task/countdown_tiny --seed_everything "$seed" --run.root "$root")
# A machine without a wheel of vLLM, such as a Mac, samples with transformers, on its CPU.
if [ "$(cat "${POPO_VENV:-.venv}/.popo-engine")" = transformers ]; then settings+=(--data.engine TransformersEngine); fi
if [ -n "${ITERATIONS:-}" ]; then settings+=(--trainer.max_epochs "$ITERATIONS"); fi
if [ -n "${DEMO:-}" ]; then settings+=(--run.resume true); fi
mkdir -p "$root"
again() { # prints the command that continues a stopped demo
  printf 'demo: stopped; continue by: DEMO=%q SEED=%q ' "$root" "$seed"
  if [ -n "${ITERATIONS:-}" ]; then printf 'ITERATIONS=%q ' "$ITERATIONS"; fi
  printf 'bash scripts/demo.sh'
  if [ $# -gt 0 ]; then printf ' %q' "$@"; fi
  printf '\n'
}
runs=() # training processes; the others print their lines and end by themselves
set -m # so that Ctrl-C reaches only this script, which passes it on
trap 'stopped=1; kill -INT "${runs[@]}" 2>/dev/null || true' INT TERM
stopped=0
failed=0
waited() { # waits for a job, and again after a signal
  while kill -0 "$1" 2>/dev/null; do wait "$1" && return 0 || code=$?; done
  return "${code:-0}"
}
show() { # prints a file's lines after a name, until a process has ended (a Mac's tail cannot wait for a process)
  local line part='' running=1
  trap '' INT TERM
  while [ "$running" ]; do
    kill -0 "$3" 2>/dev/null || running=
    while IFS= read -r line || { part+=$line && false; }; do
      printf '%s  %s\n' "$1" "$part$line"
      part=''
    done
    if [ "$running" ]; then sleep 0.2; fi
  done <"$2"
  if [ -n "$part" ]; then printf '%s  %s\n' "$1" "$part"; fi
}
start() { # runs a method in the background; its lines are printed after its name
  : >"$root/$1.log" # so that it exists when it is read
  "$bin/popo" fit "${settings[@]}" --config "method/$1" "${@:2}" >>"$root/$1.log" 2>&1 &
  job=$!
  runs+=("$job")
  show "$1" "$root/$1.log" "$job" &
  shown=$!
}
if [ "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)" -ge 2 ]; then
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
if [ "$failed" -ne 0 ]; then
  if [ "$stopped" -eq 1 ]; then again "$@"; fi
  exit "$failed"
fi
"$bin/python" scripts/demo_report.py "$root"
