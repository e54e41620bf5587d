#!/bin/sh
# @TITLE@ in verl @VERSION@ on the GPUs of one machine. Written by `rlvr-lab export --engine verl`; not run by it.
#   GPUS_PER_NODE=8 sh launch.sh [key=value ...]        further arguments are Hydra overrides
# Once before: `pip install verl==@VERSION@` with its extras for your CUDA, and this package; then `python prepare_data.py`.
set -eu
cd "$(dirname "$0")"
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}" NNODES=1
# every Ray process of verl imports this module, which registers our methods
export VERL_USE_EXTERNAL_MODULES=@MODULE@
# PYTORCH_CUDA_ALLOC_CONF stays unset: vLLM's sleep mode refuses expandable segments, and verl switches them itself
exec python -m verl.trainer.main_ppo --config-path="$PWD" --config-name=verl "$@"
