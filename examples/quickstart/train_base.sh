#!/usr/bin/env bash
# Train the small multilingual Llama that ships in examples/quickstart/base, with this repo's own engine (stage 0).
# About 70 minutes on one CPU core. Text: training pages and monolingual training text of examples/data, nothing else.
# OUT=runs/base TRAIN_ITERS=3000 bash examples/quickstart/train_base.sh     A killed run goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
OUT="${OUT:-runs/base}"
TRAIN_ITERS="${TRAIN_ITERS:-3000}"
DATA=examples/data
LANGUAGES="cs de ru tr zh fi et"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT/data"

[ -f "$OUT/untrained/model.safetensors" ] || \
  "$PYTHON" examples/quickstart/make_base.py --data-dir $DATA --output-dir "$OUT/untrained"

# Bilingual pages (paragraphs of both languages in turn, either language first), and monolingual text.
blend=()
prepare() { # name weight, then arguments of preprocess_data.py mono
  local name=$1 weight=$2; shift 2
  [ -f "$OUT/data/$name.json" ] || \
    "$PYTHON" tools/preprocess_data.py mono "$@" --tokenizer "$OUT/untrained" --output-prefix "$OUT/data/$name"
  blend+=("$weight" "$OUT/data/$name")
}
for l in $LANGUAGES; do
  prepare "pages.en-$l" 5 --input "$DATA/$l-en.train.tsv.gz" --columns en,xx --group-by page
  prepare "pages.$l-en" 5 --input "$DATA/$l-en.train.tsv.gz" --columns xx,en --group-by page
  prepare "mono.$l" 3.5 --input "$DATA/mono.$l.train.txt.gz" --min-tokens 3
done
prepare mono.en 6 --input "$DATA/mono.en.train.txt.gz" --min-tokens 3

[ -d "$OUT/start" ] || \
  "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$OUT/untrained" --output-dir "$OUT/start" --dense
"$PYTHON" tools/pretrain_mixmoe.py --mixmoe-stage 0 --init-from "$OUT/start" \
  --load "$OUT/checkpoints" --save "$OUT/checkpoints" --save-interval 200 --ckpt-fully-parallel-load \
  --data-path "${blend[@]}" --split 995,5,0 --data-cache-path "$OUT/cache" --seq-length 256 --num-workers 0 \
  --micro-batch-size 8 --global-batch-size 8 --train-iters "$TRAIN_ITERS" --eval-interval 400 --eval-iters 20 \
  --lr 2e-3 --min-lr 1e-4 --lr-decay-style WSD --lr-wsd-decay-style cosine \
  --lr-wsd-decay-iters $((TRAIN_ITERS / 5)) --override-opt-param-scheduler --lr-warmup-iters 100 \
  --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234 \
  --log-interval 20 --tensorboard-dir "$OUT/tensorboard" --tensorboard-log-interval 1
"$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/checkpoints" --output-dir "$OUT/base"
