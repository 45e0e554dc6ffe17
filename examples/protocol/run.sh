#!/usr/bin/env bash
# The paper's protocol, scaled down: one multilingual Mix-MoE on seven languages and English, both directions, from the
# text in examples/data: prepare -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> 14 directions -> report.html.
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=40         training steps and test segments grow with it; the real time depends on the machine
#   OUT=runs/protocol  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
BASE="${BASE:+$(realpath -m "$BASE")}" OUT="${OUT:+$(realpath -m "$OUT")}"  # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MINUTES="${MINUTES:-40}" OUT="${OUT:-$PWD/runs/protocol}" BASE="${BASE:-$PWD/examples/quickstart/base}"
PYTHON="$PWD/.venv/bin/python" SEQUENCE=256
LANGUAGES="cs de et fi ru tr zh"

fail() { echo "error: $*" >&2; exit 2; }
[ -x "$PYTHON" ] || fail "there is no .venv: run 'make setup' first."
[ -f "$BASE/config.json" ] || fail "BASE=$BASE is not a Hugging Face model directory: config.json is missing."
[[ "$MINUTES" =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES must be a whole number from 1."

source examples/resumable.sh
begin_run "MINUTES=$MINUTES BASE=$BASE"
STAGE1_STEPS=$((MINUTES * 8)) STAGE2_STEPS=$((MINUTES * 60)) TEST_SEGMENTS=$((MINUTES * 5 / 2 + 1))
TEXT="$OUT/text"

tokenize() {
  for language in en $LANGUAGES; do
    "$PYTHON" tools/preprocess_data.py mono --input "$TEXT/mono.$language.train.txt.gz" \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/mono.$language"
  done
  for language in $LANGUAGES; do
    "$PYTHON" tools/preprocess_data.py parallel --input "$TEXT/$language-en.train.tsv.gz" --both-directions \
      --source-language "$language" --target-language en --max-tokens $((SEQUENCE + 1)) \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$language-en"
  done
}

evaluate() {
  local words=()
  for language in $LANGUAGES; do words+=(--test "$language-en=$TEXT/$language-en.test.tsv.gz"); done
  for language in en $LANGUAGES; do words+=(--mono "$language=$TEXT/mono.$language.test.txt.gz"); done
  "$PYTHON" tools/evaluate_translation.py --system base="$BASE" --system mixmoe="$OUT/hf_mixmoe" --baseline base \
    "${words[@]}" --both-directions --limit "$TEST_SEGMENTS" --mono-limit "$TEST_SEGMENTS" \
    --decoding greedy --max-length-ratio 2 --batch-size 64 --output-dir "$OUT/evaluation"
}

step prepare "clean, deduplicate and split the text of examples/data" "$PYTHON" tools/prepare_data.py \
  --protocol examples/protocol/protocol.yaml --output-dir "$TEXT" --workers 2
step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
step data "turn the text of eight languages into token files" tokenize
read -ra mono <<< "$(for language in en $LANGUAGES; do printf '%s ' "$OUT/data/mono.$language"; done)"
step stage1 "$STAGE1_STEPS steps on monolingual text: LM experts and router" \
  train 1 $STAGE1_STEPS "$OUT/upcycled" --data-path "${mono[@]}" --split 100,0,0 \
  --data-cache-path "$OUT/data/cache" --micro-batch-size 16 --global-batch-size 16 --lr 5e-4 --min-lr 5e-5
read -ra pairs <<< "$(for language in $LANGUAGES; do printf '%s ' "$OUT/data/$language-en"; done)"
step stage2 "$STAGE2_STEPS steps on seven pairs, both directions: MT experts and router" \
  train 2 $STAGE2_STEPS "$OUT/stage1" --data-path "${pairs[@]}" --micro-batch-size 32 --global-batch-size 32 \
  --lr 2e-3 --min-lr 2e-4
step export "export Mix-MoE to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf_mixmoe" "$OUT/hf_mixmoe"
step reload "load the export without this package" reload "$OUT/hf_mixmoe"
step evaluate "translate $TEST_SEGMENTS segments of 14 directions with base and Mix-MoE; score; perplexity" evaluate
step report "write $OUT/report.html, report.md and summary.json" report "cs de et fi ru tr zh - en"
cat "$OUT/evaluation/comparison.md"
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.html"
