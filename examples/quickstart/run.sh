#!/usr/bin/env bash
# The whole path on a laptop: dense model -> upcycled -> stage 1 -> stage 2 -> Hugging Face -> scores and a report.
#   PAIR=de-en         language pair, one of examples/data/*-en.train.tsv.gz
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   MINUTES=12         training steps and test segments grow with it; the real time depends on the machine
#   OUT=runs/quickstart  everything is written there; a killed run goes on from its last finished step
set -euo pipefail
BASE="${BASE:+$(realpath -m "$BASE")}" OUT="${OUT:+$(realpath -m "$OUT")}"  # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PAIR="${PAIR:-de-en}" MINUTES="${MINUTES:-12}"
OUT="${OUT:-$PWD/runs/quickstart}" BASE="${BASE:-$PWD/examples/quickstart/base}"
PYTHON="$PWD/.venv/bin/python"
DATA=examples/data
SOURCE="${PAIR%-en}" TARGET=en

fail() { echo "error: $*" >&2; exit 2; }
[ -x "$PYTHON" ] || fail "there is no .venv: run 'make setup' first (or 'make quickstart', which does)."
pairs=$(cd $DATA && printf '%s ' *-en.train.tsv.gz | sed 's/\.train\.tsv\.gz//g')
[ -f "$DATA/$PAIR.train.tsv.gz" ] || fail "PAIR=$PAIR has no data in $DATA; choose one of: $pairs"
[ -f "$BASE/config.json" ] || fail "BASE=$BASE is not a Hugging Face model directory: config.json is missing."
[[ "$MINUTES" =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES must be a whole number from 1."

export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
mkdir -p "$OUT/logs" "$OUT/steps"
settings="PAIR=$PAIR MINUTES=$MINUTES BASE=$BASE"
[ ! -f "$OUT/settings" ] || [ "$(cat "$OUT/settings")" = "$settings" ] \
  || fail "OUT=$OUT holds a run with $(cat "$OUT/settings"); remove it or choose another OUT."
echo "$settings" > "$OUT/settings"

# One run at a time in OUT (a killed one needs a moment to let go). A step that outlived it is stopped and done again.
exec 9> "$OUT/lock"
flock -w 5 9 || fail "OUT=$OUT is in use by another run."
orphan=$(cat "$OUT/running" 2>/dev/null || echo none)
if ps -eo pgid=,args= | awk -v group="$orphan" '$1 == group' | grep -qF "$OUT"; then
  echo "stopping what a killed run left behind (process group $orphan)"; kill -KILL -- "-$orphan"; sleep 1
fi

# The newest sign of life in a log: Megatron's iteration and loss, or the last line that is no warning or memory table.
sign_of_life() {
  tr '\r' '\n' < "$1" | grep -vE '^[[:space:]]*$|warn|memory|WARNING|^> |datetime' | tail -400 \
    | { grep -E 'iteration +[0-9]+/' || tail -1 "$1" | grep -vE 'warn' || true; } | tail -1 \
    | sed -E 's/.*iteration +([0-9]+)\/ *([0-9]+).*lm loss: ([0-9.]+)E\+00.*/step \1 of \2, loss \3/' | cut -c1-110
}

# step NAME "what it says" COMMAND...: runs once, tells how far it is, keeps its output and its seconds.
step() {
  local name=$1 says=$2 start=$SECONDS next=10 log="$OUT/logs/$1.log" pid; shift 2
  if [ -f "$OUT/steps/$name" ]; then echo "[$name] done before"; return; fi
  echo "[$name] $says"
  set -m  # a process group of its own, so that all of the step can be stopped
  "$@" >> "$log" 2>&1 9>&- &
  pid=$!
  set +m
  echo $pid > "$OUT/running"
  trap 'kill -- -$pid 2>/dev/null; echo "interrupted; the same command goes on from here" >&2; exit 130' INT TERM
  while kill -0 $pid 2>/dev/null; do
    sleep 0.5
    if [ $((SECONDS - start)) -ge $next ]; then
      next=$((next + 10)); echo "[$name] $((SECONDS - start)) s: $(sign_of_life "$log")"
    fi
  done
  trap - INT TERM
  if ! wait $pid; then
    grep -hE '^error: |^[A-Za-z.]*Error: ' "$log" | tail -1 >&2 || true
    fail "step $name failed; its whole output is in $log"
  fi
  echo "$((SECONDS - start))" > "$OUT/steps/$name.tmp"; mv "$OUT/steps/$name.tmp" "$OUT/steps/$name"
}

# Run a command after removing what a killed run left of its output, the last word.
fresh() { rm -rf "${@:$#}"; "${@:1:$#-1}"; }

prepare_data() {
  for language in $SOURCE $TARGET; do
    "$PYTHON" tools/preprocess_data.py mono --input "$DATA/mono.$language.train.txt.gz" \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/mono.$language"
  done
  "$PYTHON" tools/preprocess_data.py parallel --input "$DATA/$PAIR.train.tsv.gz" --both-directions \
    --source-language "$SOURCE" --target-language $TARGET --source-column xx --target-column en \
    --max-tokens $((SEQUENCE + 1)) --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$PAIR"
}

train() { # stage, steps, parent, then the stage's own flags
  local stage=$1 steps=$2 parent=$3; shift 3
  "$PYTHON" tools/pretrain_mixmoe.py --mixmoe-stage "$stage" --init-from "$parent" \
    --load "$OUT/stage$stage" --save "$OUT/stage$stage" --save-interval $((steps / 3 + 1)) --train-iters "$steps" \
    --seq-length $SEQUENCE --seed 1234 --num-workers 0 --eval-iters 0 \
    --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 --clip-grad 1.0 --log-interval 5 \
    --tensorboard-dir "$OUT/stage$stage/tensorboard" --tensorboard-log-interval 1 "$@"
}

# An export must load where this package can't be imported.
reload() {
  (cd "$OUT" && env -u PYTHONPATH "$PYTHON" - "$1" <<'PY'
import sys
sys.modules["mixmoe_megatron"] = None  # importing it raises ImportError from here on
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = model.generate(**tokenizer("English:", return_tensors="pt", return_token_type_ids=False), max_new_tokens=8)
print(type(model).__name__, "reloaded and generates:", tokenizer.decode(ids[0]))
PY
  )
}

evaluate() {
  "$PYTHON" tools/evaluate_translation.py --system base="$BASE" --system stage1="$OUT/hf_stage1" \
    --system mixmoe="$OUT/hf_mixmoe" --baseline base \
    --test "$PAIR=$DATA/$PAIR.test.tsv.gz" --source-column xx --target-column en --both-directions \
    --mono "$SOURCE=$DATA/mono.$SOURCE.test.txt.gz" --mono "$TARGET=$DATA/mono.$TARGET.test.txt.gz" \
    --limit "$TEST_SEGMENTS" --mono-limit "$TEST_SEGMENTS" --decoding greedy --max-length-ratio 2 --batch-size 64 \
    --output-dir "$OUT/evaluation"
}

report() {
  "$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
steps = sorted((pathlib.Path(sys.argv[1]) / "steps").iterdir(), key=lambda path: path.stat().st_mtime_ns)
seconds = {path.name: int(path.read_text()) for path in steps}
(pathlib.Path(sys.argv[1]) / "seconds.json").write_text(json.dumps(seconds))
PY
  "$PYTHON" tools/write_report.py --evaluation "$OUT/evaluation/evaluation.json" \
    --stage1-log "$OUT/stage1/tensorboard" --stage2-log "$OUT/stage2/tensorboard" \
    --seconds "$OUT/seconds.json" --pair "$PAIR" --toy --output-dir "$OUT"
}

SEQUENCE=256
STAGE1_STEPS=$((MINUTES * 12)) STAGE2_STEPS=$((MINUTES * 40)) TEST_SEGMENTS=$((MINUTES * 25))

step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
  fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
step data "turn the $PAIR text of $DATA into token files" prepare_data
step stage1 "$STAGE1_STEPS steps on monolingual text: LM experts and router" \
  train 1 $STAGE1_STEPS "$OUT/upcycled" --data-path "$OUT/data/mono.$SOURCE" "$OUT/data/mono.$TARGET" --split 100,0,0 \
  --data-cache-path "$OUT/data/cache" --micro-batch-size 16 --global-batch-size 16 --lr 5e-4 --min-lr 5e-5
step export1 "export stage 1 to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage1" --output-dir "$OUT/hf_stage1" "$OUT/hf_stage1"
step stage2 "$STAGE2_STEPS steps on $PAIR, both directions: MT experts and router" \
  train 2 $STAGE2_STEPS "$OUT/stage1" --data-path "$OUT/data/$PAIR" --micro-batch-size 32 --global-batch-size 32 \
  --lr 2e-3 --min-lr 2e-4
step export2 "export Mix-MoE to Hugging Face" fresh "$PYTHON" checkpoints_conversion/mixmoe_to_hf.py \
  --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf_mixmoe" "$OUT/hf_mixmoe"
step reload "load the export without this package" reload "$OUT/hf_mixmoe"
step evaluate "translate $TEST_SEGMENTS test segments each way with base, stage 1, Mix-MoE; score; perplexity" evaluate
step report "write $OUT/report.md and $OUT/summary.json" report
tr '\r' '\n' < "$OUT/logs/evaluate.log" | grep -vE '^[0-9-]+ [0-9:,]+ (INFO|WARNING)|it/s|%\|' | sed -n '/./,$p'
echo "Toy-sized figures of a toy-sized model. Report: $OUT/report.md"
