#!/usr/bin/env bash
# The paper's protocol, scaled down: one multilingual Mix-MoE on seven languages and English, both directions, from the
# text in examples/data: prepare -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> 14 directions -> report.html.
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=40         training steps and test segments grow with it; the real time depends on the machine
#   DTYPE=auto         of all training and evaluation: float32, bfloat16, float16, or the fast one of this machine
#   OUT=runs/protocol  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
MINUTES="${MINUTES:-40}" OUT="${OUT:-$PWD/runs/protocol}"
check_settings
begin_run "MINUTES=$MINUTES BASE=$BASE"
STAGE1_STEPS=$((MINUTES * 8)) STAGE2_STEPS=$((MINUTES * 60)) TEST_SEGMENTS=$((MINUTES * 5 / 2 + 1))

multilingual_stage1 $STAGE1_STEPS
step stage2 "$STAGE2_STEPS steps on seven pairs, both directions: MT experts and router" \
  train_pairs stage2 $STAGE2_STEPS "$OUT/stage1" 2e-3 ${LANGUAGES// /-en }-en
step export "export Mix-MoE to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf_mixmoe" "$OUT/hf_mixmoe"
step reload "load the export without this package" reload "$OUT/hf_mixmoe"
step evaluate "translate $TEST_SEGMENTS segments of 14 directions with base and Mix-MoE; score; perplexity" \
  evaluate_multilingual "$TEST_SEGMENTS" mixmoe="$OUT/hf_mixmoe"
step report "write $OUT/report.html, report.md and summary.json" report "$LANGUAGES - en" --toy
cat "$OUT/evaluation/comparison.md"
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.html"
print_verdict
