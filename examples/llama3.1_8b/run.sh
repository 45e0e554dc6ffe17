#!/usr/bin/env bash
#SBATCH --job-name=mixmoe-llama3.1_8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Llama-3.1-8B, both stages on 64 A100-40G. How to run it, and its variables: examples/cluster.sh
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
NAME=llama3.1_8b MODEL=Llama-3.1-8B GPUS=64
LAYOUT="--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4"
STAGE1_MICRO_BATCH=2 STAGE2_MICRO_BATCH=1
source examples/cluster.sh
