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
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}" FULL_LR="${FULL_LR:-5e-4}"
OUT="${OUT:-$PWD/runs/interference}"
check_settings
check_pair
[[ "$FULL_LR" =~ ^[0-9]*\.?[0-9]+(e-[0-9]+)?$ ]] || fail "FULL_LR=$FULL_LR must be a learning rate such as 5e-4."

begin_run "PAIR=$PAIR MINUTES=$MINUTES FULL_LR=$FULL_LR BASE=$BASE"
STAGE1_STEPS=$((MINUTES * 12)) STAGE2_STEPS=$((MINUTES * 40)) TEST_SEGMENTS=$((MINUTES * 25))
languages=("${PAIR%-en}" en)

full() { stage_dir="$OUT/$1" "${@:2}"; }  # NAME, then train_mono or train_pairs with their words, in stage 0

export_model() {  # CHECKPOINT NAME
  local hf="$OUT/hf_$2"
  fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/$1" --output-dir "$hf" "$hf"
}

step dense "take $BASE to Megatron as it is" fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --dense \
  --hf-dir "$BASE" --output-dir "$OUT/dense" "$OUT/dense"
step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
step data "turn the $PAIR text of examples/data into token files" tokenize_pair "$PAIR"
step stage1 "Mix-MoE: $STAGE1_STEPS steps on monolingual text" \
  train_mono 1 $STAGE1_STEPS "$OUT/upcycled" "${languages[@]}"
step stage2 "Mix-MoE: $STAGE2_STEPS steps on $PAIR, both directions" \
  train_pairs 2 $STAGE2_STEPS "$OUT/stage1" 2e-3 "$PAIR"
step sft "sft: $STAGE2_STEPS steps on $PAIR, all parameters" \
  full sft train_pairs 0 $STAGE2_STEPS "$OUT/dense" "$FULL_LR" "$PAIR"
step pt "pt_sft: $STAGE1_STEPS steps on monolingual text, all parameters" \
  full pt train_mono 0 $STAGE1_STEPS "$OUT/dense" "${languages[@]}"
step pt_sft "pt_sft: $STAGE2_STEPS steps on $PAIR, all parameters" \
  full pt_sft train_pairs 0 $STAGE2_STEPS "$OUT/pt" "$FULL_LR" "$PAIR"
for name in sft pt_sft; do step "export_$name" "export $name to Hugging Face" export_model $name $name; done
step export "export Mix-MoE to Hugging Face" export_model stage2 mixmoe
step evaluate "translate $TEST_SEGMENTS test segments each way with four models; score; perplexity" \
  evaluate_pair "$PAIR" "$TEST_SEGMENTS" sft="$OUT/hf_sft" pt_sft="$OUT/hf_pt_sft" mixmoe="$OUT/hf_mixmoe"
step report "write $OUT/report.html, report.md and summary.json" report "$PAIR"
cat "$OUT/evaluation/comparison.md"
sed -n '/^## What was kept/,/^###/p' "$OUT/report.md" | grep '^|'
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.html"
