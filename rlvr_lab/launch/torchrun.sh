#!/bin/sh
# @TITLE@ with rlvr_lab's own trainer on the GPUs of one machine: GPUS_PER_NODE=8 sh launch.sh [--resume]
set -eu
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" -m rlvr_lab.cli train recipe.yaml --out run "$@"
