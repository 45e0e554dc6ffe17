#!/usr/bin/env bash
# The whole path on a laptop: dense model -> upcycled -> stage 1 -> stage 2 -> Hugging Face -> scores and a report.
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=12         training steps and test segments grow with it; the real time depends on the machine
#   OUT=runs/quickstart  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
BASE="${BASE:+$(realpath -m "$BASE")}" OUT="${OUT:+$(realpath -m "$OUT")}"  # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}"
OUT="${OUT:-$PWD/runs/quickstart}" BASE="${BASE:-$PWD/examples/quickstart/base}"
PYTHON="$PWD/.venv/bin/python"
DATA=examples/data
SOURCE="${PAIR%-en}" TARGET=en SEQUENCE=256

fail() { echo "error: $*" >&2; exit 2; }
[ -x "$PYTHON" ] || fail "there is no .venv: run 'make setup' first (or 'make quickstart', which does)."
pairs=$(cd $DATA && printf '%s ' *-en.train.tsv.gz | sed 's/\.train\.tsv\.gz//g')
[ -f "$DATA/$PAIR.train.tsv.gz" ] || fail "PAIR=$PAIR has no data in $DATA; choose one of: $pairs"
[ -f "$BASE/config.json" ] || fail "BASE=$BASE is not a Hugging Face model directory: config.json is missing."
[[ "$MINUTES" =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES must be a whole number from 1."

source examples/resumable.sh
begin_run "PAIR=$PAIR MINUTES=$MINUTES BASE=$BASE"

prepare_data() {
  for language in $SOURCE $TARGET; do
    "$PYTHON" tools/preprocess_data.py mono --input "$DATA/mono.$language.train.txt.gz" \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/mono.$language"
  done
  "$PYTHON" tools/preprocess_data.py parallel --input "$DATA/$PAIR.train.tsv.gz" --both-directions \
    --source-language "$SOURCE" --target-language $TARGET --source-column xx --target-column en \
    --max-tokens $((SEQUENCE + 1)) --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$PAIR"
}

evaluate() {
  "$PYTHON" tools/evaluate_translation.py --system base="$BASE" --system stage1="$OUT/hf_stage1" \
    --system mixmoe="$OUT/hf_mixmoe" --baseline base \
    --test "$PAIR=$DATA/$PAIR.test.tsv.gz" --source-column xx --target-column en --both-directions \
    --mono "$SOURCE=$DATA/mono.$SOURCE.test.txt.gz" --mono "$TARGET=$DATA/mono.$TARGET.test.txt.gz" \
    --limit "$TEST_SEGMENTS" --mono-limit "$TEST_SEGMENTS" --decoding greedy --max-length-ratio 2 --batch-size 64 \
    --output-dir "$OUT/evaluation"
}

STAGE1_STEPS=$((MINUTES * 12)) STAGE2_STEPS=$((MINUTES * 40)) TEST_SEGMENTS=$((MINUTES * 25))

step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
step data "turn the $PAIR text of $DATA into token files" prepare_data
step stage1 "$STAGE1_STEPS steps on monolingual text: LM experts and router" \
  train 1 $STAGE1_STEPS "$OUT/upcycled" --data-path "$OUT/data/mono.$SOURCE" "$OUT/data/mono.$TARGET" --split 100,0,0 \
  --data-cache-path "$OUT/data/cache" --micro-batch-size 16 --global-batch-size 16 --lr 5e-4 --min-lr 5e-5
step export1 "export stage 1 to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage1" --output-dir "$OUT/hf_stage1" "$OUT/hf_stage1"
step stage2 "$STAGE2_STEPS steps on $PAIR, both directions: MT experts and router" \
  train 2 $STAGE2_STEPS "$OUT/stage1" --data-path "$OUT/data/$PAIR" --micro-batch-size 32 --global-batch-size 32 \
  --lr 2e-3 --min-lr 2e-4
step export2 "export Mix-MoE to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf_mixmoe" "$OUT/hf_mixmoe"
step reload "load the export without this package" reload "$OUT/hf_mixmoe"
step evaluate "translate $TEST_SEGMENTS test segments each way with base, stage 1, Mix-MoE; score; perplexity" evaluate
step report "write $OUT/report.md and $OUT/summary.json" report "$PAIR"
tr '\r' '\n' < "$OUT/logs/evaluate.log" | grep -vE '^[0-9-]+ [0-9:,]+ (INFO|WARNING)|it/s|%\|' | sed -n '/./,$p'
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.md"
