#!/usr/bin/env bash
# Serves a judge with vLLM's OpenAI-compatible API. All arguments go to `vllm serve` unchanged:
#
#   CUDA_VISIBLE_DEVICES=0,1 docker/start_vllm_judge.sh --max-model-len 8192
#   MODEL_PATH=TIGER-Lab/RationalRewards-8B-Edit PORT=8001 docker/start_vllm_judge.sh
#
# The variables, with their defaults in parentheses:
#
# MODEL_PATH               checkpoint: an id on the hub or a folder (TIGER-Lab/RationalRewards-8B-T2I)
# SERVED_MODEL_NAME        name of the model, for `vlm_model` in the rewards file (the last part of MODEL_PATH)
# HOST, PORT               address to listen on (127.0.0.1, 8000); HOST=0.0.0.0 for workers on other machines
# TENSOR_PARALLEL_SIZE     GPUs that share one copy of the model (1)
# DATA_PARALLEL_SIZE       copies of the model (as many as the GPUs in CUDA_VISIBLE_DEVICES hold; 1 if that is not set)
# GPU_MEMORY_UTILIZATION   share of each GPU's memory that vLLM takes (0.9)
# VLLM_API_KEY             key that requests below /v1 must have (none); --api-key would show it on the command line
# VLLM_BIN                 the vllm command (vllm)
# VLLM_NO_USAGE_STATS      1 unless set to 0: vLLM sends no usage statistics
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-TIGER-Lab/RationalRewards-8B-T2I}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
TENSOR_PARALLEL_SIZE=${TENSOR_PARALLEL_SIZE:-1}
GPU_MEMORY_UTILIZATION=${GPU_MEMORY_UTILIZATION:-0.9}
VLLM_BIN=${VLLM_BIN:-vllm}
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}

if [[ -z ${SERVED_MODEL_NAME:-} ]]; then
  SERVED_MODEL_NAME=${MODEL_PATH%/}
  SERVED_MODEL_NAME=${SERVED_MODEL_NAME##*/}
fi

IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES:-0}"
if [[ -z ${DATA_PARALLEL_SIZE:-} ]]; then
  DATA_PARALLEL_SIZE=$((${#devices[@]} / TENSOR_PARALLEL_SIZE))
  ((DATA_PARALLEL_SIZE >= 1)) || DATA_PARALLEL_SIZE=1
fi
num_used=$((TENSOR_PARALLEL_SIZE * DATA_PARALLEL_SIZE))
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] && ((num_used != ${#devices[@]})); then
  echo "TENSOR_PARALLEL_SIZE $TENSOR_PARALLEL_SIZE x DATA_PARALLEL_SIZE $DATA_PARALLEL_SIZE needs $num_used GPUs," \
    "CUDA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES names ${#devices[@]}" >&2
fi

if ! command -v "$VLLM_BIN" >/dev/null; then
  echo "no command $VLLM_BIN: install vLLM (pip install vllm) or name it as VLLM_BIN" >&2
  exit 127
fi

exec "$VLLM_BIN" serve "$MODEL_PATH" \
  --served-model-name "$SERVED_MODEL_NAME" \
  --host "$HOST" \
  --port "$PORT" \
  --tensor-parallel-size "$TENSOR_PARALLEL_SIZE" \
  --data-parallel-size "$DATA_PARALLEL_SIZE" \
  --gpu-memory-utilization "$GPU_MEMORY_UTILIZATION" \
  "$@"
