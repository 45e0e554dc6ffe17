#!/usr/bin/env bash
#SBATCH --job-name=mixmoe-llama3.2_1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Llama-3.2-1B, both stages on 8 A100-40G. How to run it, and its variables: examples/cluster.sh
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
NAME=llama3.2_1b MODEL=Llama-3.2-1B GPUS=8
LAYOUT="--expert-model-parallel-size 4"
STAGE1_MICRO_BATCH=4 STAGE2_MICRO_BATCH=4
source examples/cluster.sh
