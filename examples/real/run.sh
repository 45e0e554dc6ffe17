#!/usr/bin/env bash
# The whole path on a really pretrained base: base zero-shot, upcycled, stage 1, Mix-MoE, and full fine-tuning of the
# same base on the same pairs for the same steps. Its last line says whether Mix-MoE beats the untouched base.
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: Qwen2.5-Coder-0.5B, made by
#                      examples/pretrained_bases/make_base.py in runs/bases)
#   HOURS=1.5          of the whole run; the steps are what the measured tokens a second leave room for
#   START=copy         how the experts start: copy (each is a whole FFN, so the model is nearly the base; the last
#                      layer of each four) or important (the neurons, and layers, that count on the pair's own text)
#   SEGMENTS=200       test segments each way
#   TEXTS=100          held-out texts of each language, for retention
#   PLAN=FILE          the plan of an earlier run (its OUT/plan) instead of a new one: same steps, so the same figures
#   STAGE1_LR=2e-5 STAGE2_LR=2e-5 FULL_LR=6.67e-6  highest learning rates of stage 1, stage 2 and full fine-tuning;
#                      of both stages 2e-4 with START=important
#   RATES=1            no comparison: each training for 30 steps at a third of its rate, at it and at three times it
#   DTYPE=auto         of all training and evaluation: float32, bfloat16, float16, or the fast one of this machine
#   OUT=runs/real      everything is written there; a killed run goes on from its last finished step
set -euo pipefail
PLAN="${PLAN:+$(realpath -m "$PLAN")}"
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
source examples/comparison.sh
PAIR="${PAIR:-de-en}" HOURS="${HOURS:-1.5}" SEGMENTS="${SEGMENTS:-200}" TEXTS="${TEXTS:-100}"
START="${START:-copy}" FULL_LR="${FULL_LR:-6.67e-6}"
OUT="${OUT:-$PWD/runs/real}" MONO_BATCH=4 PAIR_BATCH=8 EVALUATION_BATCH=64
case $START in
  copy)
    UPCYCLING_FLAGS=(--expert-init copy)
    STAGE1_LR="${STAGE1_LR:-2e-5}" STAGE2_LR="${STAGE2_LR:-2e-5}" ;;
  important)
    UPCYCLING_FLAGS=(--measure "examples/data/mono.${PAIR%-en}.train.txt.gz" examples/data/mono.en.train.txt.gz)
    STAGE1_LR="${STAGE1_LR:-2e-4}" STAGE2_LR="${STAGE2_LR:-2e-4}" ;;
  *) fail "START=$START must be copy or important." ;;
esac
UNSEEN=zh; [ "$PAIR" != zh-en ] || UNSEEN=de  # a language whose text is never trained on
check_pair
[[ "$HOURS" =~ ^[0-9]*\.?[0-9]+$ ]] || fail "HOURS=$HOURS must be a number such as 1.5."
for count in SEGMENTS TEXTS; do
  [[ "${!count}" =~ ^[1-9][0-9]*$ ]] || fail "$count=${!count} must be a whole number from 1."
done
[ -z "$PLAN" ] || grep -qE '^STAGE1_STEPS=[1-9][0-9]* STAGE2_STEPS=[1-9][0-9]*$' "$PLAN" 2>/dev/null \
  || fail "PLAN=$PLAN is not the plan of an earlier run."
for rate in STAGE1_LR STAGE2_LR FULL_LR; do check_learning_rate $rate; done
MONO_LR=$STAGE1_LR PAIR_LR=$STAGE2_LR
if [ -z "$BASE" ]; then
  BASE="$PWD/runs/bases/qwen2.5-coder-0.5b"
  [ -f "$BASE/config.json" ] || PYTHONPATH="$PWD" "$PYTHON" examples/pretrained_bases/make_base.py \
    --model qwen2.5-coder-0.5b --output-dir "$BASE"
fi
check_settings

begin_run "PAIR=$PAIR START=$START HOURS=$HOURS SEGMENTS=$SEGMENTS TEXTS=$TEXTS STAGE1_LR=$STAGE1_LR \
STAGE2_LR=$STAGE2_LR FULL_LR=$FULL_LR BASE=$BASE PLAN=$PLAN${RATES:+ RATES=1}"
convert_base
if [ -n "${RATES:-}" ]; then source examples/real/rates.sh; exit; fi
step zero_shot "translate $SEGMENTS test segments each way with the untouched base" evaluate_pair "$PAIR" "$SEGMENTS"
if [ -z "$PLAN" ]; then
  PLAN="$OUT/plan"
  measured() { LOG_INTERVAL=1 full "measured/$1" "${@:2}"; }
  step measure_stage1 "measure a step of stage 1" measured stage1 train_mono stage1 6 "$OUT/upcycled" "${PAIR%-en}" en
  step measure_stage2 "measure a step of stage 2" \
    measured stage2 train_pairs stage2 6 "$OUT/measured/stage1" "$PAIR_LR" "$PAIR"
  step measure_sft "measure a step of full fine-tuning" measured sft train_pairs dense 6 "$OUT/dense" "$FULL_LR" "$PAIR"
  rm -rf "$OUT/measured"
  step plan "divide $HOURS hours over the steps" "$PYTHON" examples/real/budget.py plan "$OUT" "$HOURS" "$PAIR"
fi
source "$PLAN"
echo "$STAGE1_STEPS steps of stage 1, $STAGE2_STEPS of stage 2 and of full fine-tuning"
train_mixmoe
train_sft
export_system upcycled upcycled
export_system stage1 stage1
export_system stage2 mixmoe
export_system sft sft
step evaluate "translate $SEGMENTS test segments each way with five models; score; perplexity" \
  evaluate_pair "$PAIR" "$SEGMENTS" upcycled="$OUT/hf_upcycled" stage1="$OUT/hf_stage1" sft="$OUT/hf_sft" \
  mixmoe="$OUT/hf_mixmoe"
step report "write $OUT/report.html, report.md and summary.json" report "$PAIR"
"$PYTHON" examples/real/budget.py costs "$OUT" "$PAIR" | tee "$OUT/costs.md"
print_results
