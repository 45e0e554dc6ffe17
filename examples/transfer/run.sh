#!/usr/bin/env bash
# Cross-lingual transfer, scaled down: one stage 1 on eight languages, stage 2 once for each training pair, and what it
# gains in 14 directions: transfer.html, .md, .csv and .json (the paper's Figures 4 and 5).
#   PAIRS="de-en fi-en ru-en"  training pairs, a stage 2 for each; all seven pairs of examples/data are tested
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=40         training steps and test segments grow with it; the real time depends on the machine
#   FROM=DIR           OUT of a run of examples/protocol: its base, text and stage 1 are used, not made again
#   DTYPE=auto         of all training and evaluation: float32, bfloat16, float16, or the fast one of this machine
#   OUT=runs/transfer  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
FROM="${FROM:+$(realpath -m "$FROM")}"
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
MINUTES="${MINUTES:-40}" OUT="${OUT:-$PWD/runs/transfer}" PAIRS="${PAIRS:-de-en fi-en ru-en}"
if [ -n "$FROM" ]; then
  for name in prepare upcycle data stage1; do
    [ -f "$FROM/steps/$name" ] || fail "FROM=$FROM is no protocol run with a finished stage 1: no steps/$name."
  done
  made_from=$(sed 's/.*BASE=//' "$FROM/settings") made_in=$(sed -n 's/^DTYPE=\([^ ]*\).*/\1/p' "$FROM/settings")
  [ "${BASE:=$made_from}" = "$made_from" ] || fail "FROM=$FROM was made from BASE=$made_from, not from BASE=$BASE."
  made_in="${made_in:-float32}"  # of a run that was made when there was no other
  [ "${DTYPE:=auto}" != auto ] || DTYPE=$made_in
  [ "$DTYPE" = "$made_in" ] || fail "FROM=$FROM was made with DTYPE=$made_in, not with DTYPE=$DTYPE."
fi
check_settings
read -ra pairs <<< "$PAIRS"
[ ${#pairs[@]} -gt 0 ] || fail "PAIRS is empty: give training pairs, as in PAIRS='de-en fi-en'."
for pair in "${pairs[@]}"; do
  [[ " ${LANGUAGES// /-en }-en " == *" $pair "* ]] || fail "PAIRS: $pair is none of ${LANGUAGES// /-en }-en."
done
[ -z "$(printf '%s\n' "${pairs[@]}" | sort | uniq -d)" ] || fail "PAIRS=$PAIRS names a pair twice."

begin_run "MINUTES=$MINUTES PAIRS=${pairs[*]} FROM=$FROM BASE=$BASE"
STAGE1_STEPS=$((MINUTES * 8)) STAGE2_STEPS=$((MINUTES * 60 / ${#pairs[@]}))
TEST_SEGMENTS=$((MINUTES * 5 / (2 + ${#pairs[@]}) + 1))
if [ -n "$FROM" ]; then
  for name in text upcycled data stage1; do ln -sfn "$FROM/$name" "$OUT/$name"; done
  for name in prepare upcycle data stage1; do cp "$FROM/steps/$name" "$OUT/steps/$name"; done
fi

train_pair() { stage_dir="$OUT/stage2_$1" train_pairs stage2 $STAGE2_STEPS "$OUT/stage1" 2e-3 "$1"; }

export_model() {
  fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/$1" --output-dir "$OUT/$2" "$OUT/$2"
}

multilingual_stage1 $STAGE1_STEPS
step export_stage1 "export stage 1 to Hugging Face" export_model stage1 hf_stage1
systems=(stage1="$OUT/hf_stage1") trained=()
for pair in "${pairs[@]}"; do
  step "stage2_$pair" "$STAGE2_STEPS steps on $pair, both directions: MT experts and router" train_pair "$pair"
  step "export_$pair" "export the model of $pair to Hugging Face" export_model "stage2_$pair" "hf_$pair"
  systems+=("$pair=$OUT/hf_$pair") trained+=(--trained "$pair=$pair")
done
step evaluate "translate $TEST_SEGMENTS segments of 14 directions with $((${#systems[@]} + 1)) models; perplexity" \
  evaluate_multilingual $TEST_SEGMENTS "${systems[@]}"
step matrix "write $OUT/transfer.html, .md, .csv and .json" "$PYTHON" tools/transfer_matrix.py \
  --evaluation "$OUT/evaluation/evaluation.json" --stage1 stage1 "${trained[@]}" --toy --output-dir "$OUT"
cat "$OUT/transfer.md"
echo "Toy-sized figures of a toy-sized model. Page: $OUT/transfer.html"
