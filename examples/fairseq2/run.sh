#!/usr/bin/env bash
# The path of the quickstart with fairseq2 as the engine: upcycled, card, both stages, Hugging Face, Megatron, scores.
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=12         training steps and test segments grow with it; the real time depends on the machine
#   OUT=runs/fairseq2  everything is written there; a killed run goes on from its last finished step or checkpoint
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../resumable.sh"
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}" DTYPE=float32
OUT="${OUT:-$PWD/runs/fairseq2}"
check_settings
check_pair
begin_run "PAIR=$PAIR MINUTES=$MINUTES BASE=$BASE"
language=${PAIR%-en} FAIRSEQ2="$PWD/.venv-fairseq2/bin/python"

# steps_of STAGE: a multiple of 4, with which each stage is validated twice and saved as often or more.
steps_of() { echo $((MINUTES * (28 * $1 - 16))); }
export_of() { echo "$OUT/stage$1/checkpoints/step_$(steps_of "$1")/hg"; }

# recipe STAGE [KEY=VALUE ...]: what examples/fairseq2/stageN.yaml says, for this pair and so many steps.
recipe() {
  local stage=$1 steps half; shift
  steps=$(steps_of "$stage") half=$((steps / 2))
  "$FAIRSEQ2" -m mixmoe_megatron.integrations.fairseq2.recipe "$OUT/stage$stage" --no-rich \
    --config-file "examples/fairseq2/stage$stage.yaml" --config "common.assets.extra_paths=[$OUT/cards]" \
    "regime.num_steps=$steps" "regime.validate_every_n_steps=$half" "regime.checkpoint_every_n_steps=$half" \
    "regime.publish_metrics_every_n_steps=$MINUTES" "$@"
}

mono() { echo "[examples/data/mono.$language.$1.txt.gz, examples/data/mono.en.$1.txt.gz]"; }
pairs() {
  echo "[{paths: [examples/data/$PAIR.$1.tsv.gz], source_language: $language, target_language: en, source_column: xx," \
    "both_directions: true}]"
}

to_card() {
  fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/upcycled" --output-dir "$OUT/hf" \
    "$OUT/hf"
  "$PYTHON" tools/fairseq2_card.py "$OUT/hf" --name mixmoe_upcycled --output-dir "$OUT/cards"
}

translate() {
  zcat "examples/data/$PAIR.test.tsv.gz" | awk -F'\t' 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "xx") xx = i }
    NR > 1 && NR < 10 { print $xx }' >"$OUT/sources.txt"
  "$FAIRSEQ2" tools/fairseq2_translate.py --model "checkpoint_step_$(steps_of 2)" --tokenizer mixmoe_upcycled \
    --cards "$OUT/cards" --checkpoint-dir "$OUT/stage2/checkpoints" --input "$OUT/sources.txt" \
    --output "$OUT/translations.txt" --source-language "$language" --target-language en --max-new-tokens 80
}

to_megatron() {
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$(export_of 2)" --output-dir "$OUT/megatron" \
    "$OUT/megatron"
  "$PYTHON" checkpoints_conversion/check_parity.py --hf-dir "$(export_of 2)" --checkpoint-dir "$OUT/megatron"
}

step environment "fairseq2 in an environment of its own, .venv-fairseq2" env ONLY_SETUP=1 tools/test_fairseq2.sh
step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
step card "export that, and write its card" to_card
step stage1 "$(steps_of 1) steps of fairseq2 on monolingual text: LM experts and router" \
  recipe 1 "dataset.config_overrides.paths=$(mono train)" "valid_dataset.config_overrides.paths=$(mono test)"
step stage2 "$(steps_of 2) steps of fairseq2 on $PAIR, both directions: MT experts and router" \
  recipe 2 "model.name=checkpoint_step_$(steps_of 1)" "common.assets.prev_checkpoint_dir=$OUT/stage1/checkpoints" \
  "dataset.config_overrides.pairs=$(pairs train)" "valid_dataset.config_overrides.pairs=$(pairs valid)"
step translate "translate eight segments with fairseq2" translate
step reload "load the export without this package" reload "$(export_of 2)"
step megatron "the trained model as a Megatron checkpoint, and layer by layer beside Hugging Face's" to_megatron
step evaluate "translate $((MINUTES * 25)) test segments each way with base, stage 1, Mix-MoE; score; perplexity" \
  evaluate_pair "$PAIR" $((MINUTES * 25)) stage1="$(export_of 1)" mixmoe="$(export_of 2)"
tr '\r' '\n' < "$OUT/logs/evaluate.log" | grep -vE '^[0-9-]+ [0-9:,]+ (INFO|WARNING)|it/s|%\|' | sed -n '/./,$p'
echo "Toy-sized figures of a toy-sized model. Losses: $OUT/stage1/metrics, $OUT/stage2/metrics"
