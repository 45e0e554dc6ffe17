#!/usr/bin/env bash
# Every method on one base: start, some steps of each of its phases, the export that its ecosystem loads, a generation.
#   METHODS="full ..."   some of the list below (default: all)
#   STEPS=20             of each phase
#   PAIR=de-en           language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR             dense Hugging Face Llama or Qwen2 directory (default: SmolLM2-135M, made by
#                        examples/pretrained_bases/make_base.py in runs/bases)
#   DTYPE=auto           or float32, bfloat16, float16
#   OUT=runs/methods     everything is written there; a killed run goes on from its last finished step
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
ALL="full mixmoe lora llama_pro moe moe_all moe_lpr llama_moe_v2 llama_moe_v2_residual"
METHODS="${METHODS:-$ALL}" STEPS="${STEPS:-20}" PAIR="${PAIR:-de-en}" OUT="${OUT:-$PWD/runs/methods}"
MONO_BATCH=4 PAIR_BATCH=8 LOG_INTERVAL=1
[[ "$STEPS" =~ ^[1-9][0-9]*$ ]] || fail "STEPS=$STEPS must be a whole number from 1."
for name in $METHODS; do [[ " $ALL " == *" $name "* ]] || fail "METHODS: $name is not one of: $ALL"; done
check_pair
if [ -z "$BASE" ]; then
  BASE="$PWD/runs/bases/smollm2-135m"
  [ -f "$BASE/config.json" ] || PYTHONPATH="$PWD" "$PYTHON" examples/pretrained_bases/make_base.py \
    --model smollm2-135m --output-dir "$BASE"
fi
check_settings
begin_run "PAIR=$PAIR STEPS=$STEPS BASE=$BASE"

# start NAME WORD...: the method's start from the base, in OUT/NAME/start.
start() {
  local directory="$OUT/$1/start"; shift
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" "$@" --output-dir "$directory" "$directory"
}

# trained NAME PHASE PARENT RATE: on the text that the phase is for, in OUT/NAME/PHASE.
trained() {
  local name=$1 phase=$2 parent="$OUT/$1/$3" rate=$4
  export stage_dir="$OUT/$name/$phase"
  [ "$phase" != lpr_router ] || TRAIN_FLAGS=(--lpr-original-data-path "$OUT/data/mono.en")
  case $phase in
    stage1 | lpr_*) MONO_LR=$rate train_mono "$phase" "$STEPS" "$parent" "${PAIR%-en}" en ;;
    *) train_pairs "$phase" "$STEPS" "$parent" "$rate" "$PAIR" ;;
  esac
}

# exported NAME PHASE: what `mixmoe to-hf` makes of it, loaded where this package can't be imported.
exported() {
  local directory="$OUT/$1/model"
  fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/$1/$2" --output-dir "$directory" \
    "$directory"
  reload "$directory"
}

# method NAME START PHASE=RATE...: all of it.
method() {
  local name=$1 words phase parent=start trained_phase; read -ra words <<< "$2"; shift 2
  [[ " $METHODS " == *" $name "* ]] || return 0
  step "${name}_start" "$name: start from $BASE" start "$name" "${words[@]}"
  for trained_phase in "$@"; do
    phase=${trained_phase%=*}
    step "${name}_$phase" "$name: $STEPS steps of $phase" trained "$name" "$phase" "$parent" "${trained_phase#*=}"
    parent=$phase
  done
  step "${name}_export" "$name: export, reload, generate" exported "$name" "$parent"
}

# the tokenizer of every start is the base's
mkdir -p "$OUT/upcycled"; ln -sfn "$BASE" "$OUT/upcycled/tokenizer"
step data "turn the $PAIR text of examples/data into token files" tokenize_pair "$PAIR"
method full "--dense" dense=5e-5
method mixmoe "" stage1=5e-4 stage2=5e-4
method lora "--method lora" lora=5e-4
method llama_pro "--method llama_pro" llama_pro=5e-4
method moe "--method moe" moe=5e-4
method moe_all "--method moe" moe_all=5e-5
method moe_lpr "--method moe_lpr" lpr_experts=5e-4 lpr_router=5e-4
method llama_moe_v2 "--method llama_moe_v2" llama_moe_v2=5e-5
method llama_moe_v2_residual "--method llama_moe_v2_residual" llama_moe_v2_residual=5e-5
"$PYTHON" examples/methods/tell.py "$OUT" | tee "$OUT/methods.md"
