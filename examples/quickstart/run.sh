#!/usr/bin/env bash
# The whole path on a laptop: dense model -> upcycled -> stage 1 -> stage 2 -> Hugging Face -> scores and a report.
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=12         training steps and test segments grow with it; the real time depends on the machine
#   DTYPE=auto         of all training and evaluation: float32, bfloat16, float16, or the fast one of this machine
#   OUT=runs/quickstart  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}"
OUT="${OUT:-$PWD/runs/quickstart}"
check_settings
check_pair
begin_run "PAIR=$PAIR MINUTES=$MINUTES BASE=$BASE"

STAGE1_STEPS=$((MINUTES * 12)) STAGE2_STEPS=$((MINUTES * 40)) TEST_SEGMENTS=$((MINUTES * 25))

step upcycle "cut every fourth FFN of $BASE into 4 LM experts, and measure what that costs" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" \
  --measure "examples/data/mono.${PAIR%-en}.train.txt.gz" examples/data/mono.en.train.txt.gz \
  --moe-layer-placement last --output-dir "$OUT/upcycled" "$OUT/upcycled"
grep '^|' "$OUT/logs/upcycle.log"
step data "turn the $PAIR text of examples/data into token files" tokenize_pair "$PAIR"
step stage1 "$STAGE1_STEPS steps on monolingual text: LM experts and router" \
  train_mono stage1 $STAGE1_STEPS "$OUT/upcycled" "${PAIR%-en}" en
step export1 "export stage 1 to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage1" --output-dir "$OUT/hf_stage1" "$OUT/hf_stage1"
step stage2 "$STAGE2_STEPS steps on $PAIR, both directions: MT experts and router" \
  train_pairs stage2 $STAGE2_STEPS "$OUT/stage1" 2e-3 "$PAIR"
step export2 "export Mix-MoE to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf_mixmoe" "$OUT/hf_mixmoe"
step reload "load the export without this package" reload "$OUT/hf_mixmoe"
step evaluate "translate $TEST_SEGMENTS test segments each way with base, stage 1, Mix-MoE; score; perplexity" \
  evaluate_pair "$PAIR" "$TEST_SEGMENTS" stage1="$OUT/hf_stage1" mixmoe="$OUT/hf_mixmoe"
step report "write $OUT/report.md and $OUT/summary.json" report "$PAIR" --toy
tr '\r' '\n' < "$OUT/logs/evaluate.log" | grep -vE '^[0-9-]+ [0-9:,]+ (INFO|WARNING)|it/s|%\|' | sed -n '/./,$p'
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.md"
print_verdict
