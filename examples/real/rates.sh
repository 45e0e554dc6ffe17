# Sourced by run.sh where RATES=1: each training for some steps at a third of its learning rate, at it and at three
# times it, and the loss that it then has on text of the same kind that it has not read and no comparison reads.
TRIAL_STEPS=30

tokenize_valid() {
  "$PYTHON" tools/preprocess_data.py parallel --input "examples/data/$PAIR.valid.tsv.gz" --both-directions \
    --source-language "${PAIR%-en}" --target-language en --source-column xx --target-column en \
    --max-tokens $((SEQUENCE + 1)) --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$PAIR.valid"
}

# trial NAME RATE: its checkpoint is removed but for the stage 1 that the trials of stage 2 start from.
trial() {
  local name=$1 rate=$2 directory="rates/$1-$2"
  local pairs=(--train-data-path "$OUT/data/$PAIR" --valid-data-path "$OUT/data/$PAIR.valid")
  TRAIN_FLAGS=(--eval-interval 1000000 --eval-iters 40)  # after the last step alone
  case $name in
    stage1) MONO_LR=$rate TRAIN_FLAGS+=(--split 90,10,0)
      full "$directory" train_mono stage1 $TRIAL_STEPS "$OUT/upcycled" "${PAIR%-en}" en ;;
    stage2) TRAIN_FLAGS+=("${pairs[@]}")
      full "$directory" train_pairs stage2 $TRIAL_STEPS "$OUT/rates/stage1-$STAGE1_LR" "$rate" ;;
    sft) TRAIN_FLAGS+=("${pairs[@]}")
      full "$directory" train_pairs dense $TRIAL_STEPS "$OUT/dense" "$rate" ;;
  esac
  [ "$name" = stage1 ] && [ "$rate" = "$STAGE1_LR" ] || rm -rf "${OUT:?}/$directory"
}

step valid "turn the valid text of $PAIR into token files" tokenize_valid
for name in stage1 stage2 sft; do
  case $name in stage1) rate=$STAGE1_LR ;; stage2) rate=$STAGE2_LR ;; sft) rate=$FULL_LR ;; esac
  for tried in "$rate" "$("$PYTHON" -c "print(f'{$rate / 3:.3g}')")" "$("$PYTHON" -c "print(f'{$rate * 3:.3g}')")"; do
    step "rate_${name}_$tried" "$name: $TRIAL_STEPS steps at a learning rate of $tried" trial $name "$tried"
  done
done
"$PYTHON" examples/real/budget.py rates "$OUT" "$PAIR" | tee "$OUT/rates.md"
