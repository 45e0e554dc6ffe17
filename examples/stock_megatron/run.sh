#!/usr/bin/env bash
# Both stages of Mix-MoE with the unmodified pretrain_gpt.py of a Megatron-LM checkout (release 0.19).
#
#   MEGATRON=DIR UPCYCLED=DIR MONO=PREFIX PAIRS=PREFIX OUT=DIR [GPUS=8] run.sh
#
# UPCYCLED: of checkpoints_conversion/hf_to_mixmoe.py; MONO, PAIRS: of tools/preprocess_data.py. The same command goes
# on where a run was stopped.
set -euo pipefail

: "${MEGATRON:?a Megatron-LM checkout, release 0.19}" "${UPCYCLED:?an upcycled checkpoint}"
: "${MONO:?token files of monolingual text}" "${PAIRS:?token files of parallel text}" "${OUT:?where the runs are saved}"
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GPUS=${GPUS:-8}

train() {
  local stage=$1 parent=$2 data=$3 model own
  own=(
    --pretrained-checkpoint "$parent" --load "$OUT/stage$stage" --save "$OUT/stage$stage" --save-interval 500
    --data-path 1 "$data" --split 100,0,0 --eval-iters 0
    --seq-length 2048 --micro-batch-size 2 --global-batch-size 256 --train-iters 2000
    --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.1 --clip-grad 1.0
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --expert-model-parallel-size "${EP:-4}" --log-interval 10 --tensorboard-dir "$OUT/stage$stage/tensorboard"
  )
  mapfile -t model < <(python "$here/flags.py" "$stage" "${own[@]}")
  [ "${#model[@]}" -gt 0 ] || exit 2  # flags.py has said why
  torchrun --nproc-per-node "$GPUS" "$MEGATRON/pretrain_gpt.py" \
    --spec mixmoe_megatron.integrations.stock_megatron "stage$stage" "${model[@]}" "${own[@]}"
}

train 1 "$UPCYCLED" "$MONO"
train 2 "$OUT/stage1" "$PAIRS"
