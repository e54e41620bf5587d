#!/bin/sh
# @TITLE@ in verl @VERSION@ on several machines without a scheduler. On a file system that all of them see:
#   machine 0:   sh ray.sh head                                  prints the address
#   others:      HEAD=10.0.0.1 sh ray.sh worker
#   machine 0:   NNODES=4 sh ray.sh run [key=value ...]          starts once all GPUs are there
#   each:        sh ray.sh stop
# Not run by this project: it needs GPUs.
set -eu
cd "$(dirname "$0")"
PORT="${PORT:-6379}"
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}" NNODES="${NNODES:-2}"
export VERL_USE_EXTERNAL_MODULES=@MODULE@
# set these before Ray starts: its workers inherit the environment of `ray start`, not that of the driver
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" TORCH_NCCL_ASYNC_ERROR_HANDLING=1
case "${1:-}" in
  head) exec ray start --head --port="$PORT" --num-gpus="$GPUS_PER_NODE" --dashboard-host=127.0.0.1 --block ;;
  worker) exec ray start --address="${HEAD:?set HEAD to the address of machine 0}:$PORT" --num-gpus="$GPUS_PER_NODE" --block ;;
  stop) exec ray stop ;;
  run)
    shift
    export RAY_ADDRESS="${RAY_ADDRESS:-127.0.0.1:$PORT}"
    python wait_for_gpus.py "$((GPUS_PER_NODE * NNODES))"
    exec python -m verl.trainer.main_ppo --config-path="$PWD" --config-name=verl "$@"
    ;;
  *) echo "usage: sh ray.sh head|worker|run|stop" >&2; exit 2 ;;
esac
