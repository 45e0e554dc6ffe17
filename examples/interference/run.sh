#!/usr/bin/env bash
# What does training on parallel text cost the model's other abilities? Mix-MoE beside full fine-tuning of the same base
# on the same text for the same steps (the paper's Table VII): translation scores and perplexity of monolingual text.
#   sft     all parameters, parallel text          pt_sft  all parameters, monolingual text, then parallel text
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=12         training steps and test segments grow with it; the whole run takes about three times as long
#   FULL_LR=5e-4       highest learning rate of full fine-tuning on parallel text; at stage 2's 2e-3 its loss rises
#   DTYPE=auto         of all training and evaluation: float32, bfloat16, float16, or the fast one of this machine
#   OUT=runs/interference  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
source examples/comparison.sh
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}" PAIR_LR=2e-3 FULL_LR="${FULL_LR:-5e-4}"
OUT="${OUT:-$PWD/runs/interference}"
check_settings
check_pair
check_learning_rate FULL_LR

begin_run "PAIR=$PAIR MINUTES=$MINUTES FULL_LR=$FULL_LR BASE=$BASE"
STAGE1_STEPS=$((MINUTES * 12)) STAGE2_STEPS=$((MINUTES * 40)) TEST_SEGMENTS=$((MINUTES * 25))
convert_base
train_mixmoe
train_sft
train_pt_sft
export_system stage2 mixmoe
for name in sft pt_sft; do export_system $name $name; done
step evaluate "translate $TEST_SEGMENTS test segments each way with four models; score; perplexity" \
  evaluate_pair "$PAIR" "$TEST_SEGMENTS" sft="$OUT/hf_sft" pt_sft="$OUT/hf_pt_sft" mixmoe="$OUT/hf_mixmoe"
step report "write $OUT/report.html, report.md and summary.json" report "$PAIR" --toy
echo "Toy-sized figures of a toy-sized model."
print_results
