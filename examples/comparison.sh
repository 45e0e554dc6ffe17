# Sourced after resumable.sh: Mix-MoE beside full fine-tuning of the same base, on the same text for the same steps.
# Needs PAIR, BASE, OUT and, for training, STAGE1_STEPS, STAGE2_STEPS, PAIR_LR, FULL_LR. UPCYCLING_FLAGS may say how the
# experts start.
#   upcycled  Mix-MoE before any training            stage1    after monolingual text
#   sft       all parameters, parallel text          pt_sft    all parameters, monolingual text, then parallel text

full() { stage_dir="$OUT/$1" "${@:2}"; }  # NAME, then train_mono or train_pairs with their words

UPCYCLING_FLAGS=()

export_system() {  # CHECKPOINT NAME
  local hf="$OUT/hf_$2"
  step "export_$2" "export $2 to Hugging Face" \
    fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/$1" --output-dir "$hf" "$hf"
}

convert_base() {
  step dense "take $BASE to Megatron as it is" fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --dense \
    --hf-dir "$BASE" --output-dir "$OUT/dense" "$OUT/dense"
  step upcycle "make LM experts of some FFNs of $BASE" \
    fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" "${UPCYCLING_FLAGS[@]}" \
    --output-dir "$OUT/upcycled" "$OUT/upcycled"
  step data "turn the $PAIR text of examples/data into token files" tokenize_pair "$PAIR"
}

train_mixmoe() {
  step stage1 "Mix-MoE: $STAGE1_STEPS steps on monolingual text" \
    train_mono stage1 "$STAGE1_STEPS" "$OUT/upcycled" "${PAIR%-en}" en
  step stage2 "Mix-MoE: $STAGE2_STEPS steps on $PAIR, both directions" \
    train_pairs stage2 "$STAGE2_STEPS" "$OUT/stage1" "$PAIR_LR" "$PAIR"
}

train_sft() {
  step sft "sft: $STAGE2_STEPS steps on $PAIR, all parameters" \
    full sft train_pairs dense "$STAGE2_STEPS" "$OUT/dense" "$FULL_LR" "$PAIR"
}

train_pt_sft() {
  step pt "pt_sft: $STAGE1_STEPS steps on monolingual text, all parameters" \
    full pt train_mono dense "$STAGE1_STEPS" "$OUT/dense" "${PAIR%-en}" en
  step pt_sft "pt_sft: $STAGE2_STEPS steps on $PAIR, all parameters" \
    full pt_sft train_pairs dense "$STAGE2_STEPS" "$OUT/pt" "$FULL_LR" "$PAIR"
}

# What a run ends with: its tables, and at last how Mix-MoE stands against the untouched base and full fine-tuning.
print_results() {
  cat "$OUT/evaluation/comparison.md"
  sed -n '/^## What was kept/,/^###/p' "$OUT/report.md" | grep '^|'
  echo "Report: $OUT/report.html"
  print_verdict
}
