#!/usr/bin/env bash
#SBATCH --job-name=mixmoe-qwen2.5_14b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Qwen2.5-14B, both stages on 128 A100-40G. How to run it, and its variables: examples/cluster.sh
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
NAME=qwen2.5_14b MODEL=Qwen2.5-14B GPUS=128
LAYOUT="--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 4
  --expert-tensor-parallel-size 4"
STAGE1_MICRO_BATCH=2 STAGE2_MICRO_BATCH=1
source examples/cluster.sh
