#!/usr/bin/env bash
# Trains POPO and then GRPO on the embedded Countdown task with the same seed and budget, and compares them.
# SEED (1) and ITERATIONS (that of the task) may be set. Further arguments go to both runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${POPO_VENV:-.venv}/bin
seed=${SEED:-1}
root=runs/demo-$(date +%Y%m%d-%H%M%S)
settings=(--config configs/task/countdown_tiny.yaml --seed_everything "$seed" --run.root "$root")
if [ -n "${ITERATIONS:-}" ]; then settings+=(--trainer.max_epochs "$ITERATIONS"); fi
for method in popo grpo; do
  echo "== $method, seed $seed"
  "$bin/popo" fit "${settings[@]}" --config "configs/method/$method.yaml" "$@"
done
"$bin/python" scripts/demo_report.py "$root"
