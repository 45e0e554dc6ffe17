# Sourced by the examples' run.sh, first of all: goes to the repository's root; steps that run once, tell how far they
# are, and go on after a kill. Needs: set -euo pipefail. After it run.sh gives MINUTES, OUT and what else may be set its
# defaults, then calls check_settings.
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: examples/quickstart/base)
#   DTYPE=auto         or float32, bfloat16, float16: all training and evaluation; auto: bfloat16 where it is fast here

BASE="${BASE:+$(realpath -m "$BASE")}" OUT="${OUT:+$(realpath -m "$OUT")}"  # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$PWD/.venv/bin/python" SEQUENCE=256 UNSEEN=""
MONO_BATCH=16 PAIR_BATCH=32 MONO_LR=5e-4 LOG_INTERVAL=5 EVALUATION_BATCH=64

fail() { echo "error: $*" >&2; exit 2; }

# What every example asks of its settings.
check_settings() {
  BASE="${BASE:-$PWD/examples/quickstart/base}"
  [ -x "$PYTHON" ] || fail "there is no .venv: run 'make setup' first."
  [ -f "$BASE/config.json" ] || fail "BASE=$BASE is not a Hugging Face model directory: config.json is missing."
  [[ "${MINUTES:-1}" =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES must be a whole number from 1."
}

# What those ask that train on one pair.
check_pair() {
  [ -f "examples/data/$PAIR.train.tsv.gz" ] || fail "PAIR=$PAIR has no data; choose one of: ${LANGUAGES// /-en }-en"
}

check_learning_rate() {  # NAME
  [[ "${!1}" =~ ^[0-9]*\.?[0-9]+(e-[0-9]+)?$ ]] || fail "$1=${!1} must be a learning rate such as 5e-4."
}

# begin_run SETTINGS: one run at a time in OUT, and never a run of other settings or another dtype. A step that outlived
# a killed run is stopped and done again.
begin_run() {
  local settings orphan reason
  choose_dtype
  settings="DTYPE=$DTYPE $1"
  export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
  mkdir -p "$OUT/logs" "$OUT/steps" "$OUT/spent"
  [ ! -f "$OUT/settings" ] || [ "$(cat "$OUT/settings")" = "$settings" ] \
    || fail "OUT=$OUT holds a run with $(cat "$OUT/settings"), not $settings; remove it or choose another OUT."
  echo "$settings" > "$OUT/settings"
  exec 9> "$OUT/lock"
  flock -w 5 9 || fail "OUT=$OUT is in use by another run."  # a killed one needs a moment to let go
  orphan=$(cat "$OUT/running" 2>/dev/null || echo none)
  # awk reads all that ps says: under pipefail a reader that stops early would make the answer no
  if ps -eo pgid=,args= | awk -v group="$orphan" -v out="$OUT" \
    '$1 == group && index($0, out) { found = 1 } END { exit !found }'; then
    echo "stopping what a killed run left behind (process group $orphan)"; kill -KILL -- "-$orphan"; sleep 1
  fi
  echo "training and evaluation in $DTYPE: $reason"
}

# Turn DTYPE into a dtype, and `reason` of the caller into why: the commands' own rule, asked once for the whole run.
choose_dtype() {
  local choice
  choice=$("$PYTHON" - "${DTYPE:-auto}" <<'PY'
import sys
from mixmoe_megatron.cli import run_command
from mixmoe_megatron.dtypes import choose_device, choose_dtype
sys.exit(run_command(lambda: print(*choose_dtype(sys.argv[1], choose_device()))))
PY
  )
  read -r DTYPE reason <<< "$choice"
}

# The newest sign of life in a log: Megatron's iteration and loss, or the last line that is no warning or memory table.
sign_of_life() {
  tr '\r' '\n' < "$1" | grep -vE '^[[:space:]]*$|warn|memory|WARNING|^> |datetime' | tail -400 \
    | { grep -E 'iteration +[0-9]+/' || tail -1 "$1" | grep -vE 'warn' || true; } | tail -1 \
    | sed -E 's/.*iteration +([0-9]+)\/ *([0-9]+).*lm loss: ([0-9.]+)E\+00.*/step \1 of \2, loss \3/' | cut -c1-110
}

# step NAME "what it says" COMMAND...: runs once, tells how far it is, keeps its output and its seconds.
step() {
  local name=$1 says=$2 start=$SECONDS next=10 log="$OUT/logs/$1.log" spent="$OUT/spent/$1" before=0 pid; shift 2
  if [ -f "$OUT/steps/$name" ]; then echo "[$name] done before"; return; fi
  [ ! -s "$spent" ] || before=$(cat "$spent")  # of a killed run, to ten seconds
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
      echo $((before + SECONDS - start)) > "$spent"
    fi
  done
  trap - INT TERM
  if ! wait $pid; then
    grep -hE '^error: |^[A-Za-z.]*Error: ' "$log" | tail -1 >&2 || true
    fail "step $name failed; its whole output is in $log"
  fi
  echo "$((before + SECONDS - start))" > "$OUT/steps/$name.tmp"; mv "$OUT/steps/$name.tmp" "$OUT/steps/$name"
}

# Run a command after removing what a killed run left of its output, the last word.
fresh() { rm -rf "${@:$#}"; "${@:1:$#-1}"; }

TRAIN_FLAGS=()  # of an example, after all others: the last of two of the same name holds

# One training in OUT/PHASE or $stage_dir: phase, steps, parent, then the phase's own flags. It is saved twice on the
# way, for a run that goes on, and at the end; the last checkpoint alone stays.
train() {
  local phase=$1 steps=$2 parent=$3 directory="${stage_dir:-$OUT/$1}" interval=$(($2 / 3 + 1)); shift 3
  case $DTYPE in bfloat16) set -- --bf16 "$@" ;; float16) set -- --fp16 "$@" ;; esac
  "$PYTHON" tools/pretrain_mixmoe.py --phase "$phase" --init-from "$parent" \
    --load "$directory" --save "$directory" --train-iters "$steps" \
    --save-interval $interval --save-retain-interval $((3 * interval)) \
    --seq-length $SEQUENCE --seed 1234 --num-workers 0 --eval-iters 0 \
    --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 --clip-grad 1.0 \
    --log-interval "$LOG_INTERVAL" --tensorboard-dir "$directory/tensorboard" \
    --tensorboard-log-interval 1 "$@" "${TRAIN_FLAGS[@]}"
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

# report PAIR FLAG...: report.md, report.html and summary.json in OUT, with the seconds of each finished step.
report() {
  "$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
steps = sorted((pathlib.Path(sys.argv[1]) / "steps").iterdir(), key=lambda path: path.stat().st_mtime_ns)
seconds = {path.name: int(path.read_text()) for path in steps}
(pathlib.Path(sys.argv[1]) / "seconds.json").write_text(json.dumps(seconds))
PY
  "$PYTHON" tools/write_report.py --evaluation "$OUT/evaluation/evaluation.json" \
    --stage1-log "$OUT/stage1/tensorboard" --stage2-log "$OUT/stage2/tensorboard" \
    --seconds "$OUT/seconds.json" --training-dtype "$DTYPE" --pair "$@" --output-dir "$OUT"
}

# The report's first line: how the trained model stands against the untouched base.
print_verdict() { tail -1 "$OUT/logs/report.log"; }

LANGUAGES="cs de et fi ru tr zh"  # examples/data has a pair of each with English

# What quickstart and interference share: one pair and the text of its two languages, as it is in examples/data.
tokenize_pair() {
  local pair=$1
  for language in "${pair%-en}" en; do
    "$PYTHON" tools/preprocess_data.py mono --input "examples/data/mono.$language.train.txt.gz" \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/mono.$language"
  done
  "$PYTHON" tools/preprocess_data.py parallel --input "examples/data/$pair.train.tsv.gz" --both-directions \
    --source-language "${pair%-en}" --target-language en --source-column xx --target-column en \
    --max-tokens $((SEQUENCE + 1)) --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$pair"
}

# evaluate_pair PAIR SEGMENTS NAME=DIR...: BASE and the named models in both directions and both languages, and
# UNSEEN, whose text is never trained on; tested against sft too where that is named. TEXTS of each language; SEGMENTS
# if it is not set.
evaluate_pair() {
  local pair=$1 segments=$2 words=(--system base="$BASE") system; shift 2
  for system in "$@"; do words+=(--system "$system"); done
  [[ "${words[*]}" != *" sft="* ]] || words+=(--rival sft)
  for language in "${pair%-en}" en $UNSEEN; do
    words+=(--mono "$language=examples/data/mono.$language.test.txt.gz")
  done
  "$PYTHON" tools/evaluate_translation.py --baseline base --dtype "$DTYPE" "${words[@]}" \
    --test "$pair=examples/data/$pair.test.tsv.gz" --source-column xx --target-column en --both-directions \
    --limit "$segments" --mono-limit "${TEXTS:-$segments}" --decoding greedy --max-length-ratio 2 \
    --batch-size "$EVALUATION_BATCH" --output-dir "$OUT/evaluation"
}

# What protocol and transfer share: all pairs, prepared by a protocol. Text and token files are in OUT.

# multilingual_stage1 STEPS: the steps from BASE and examples/data to OUT/text, OUT/data and the checkpoint OUT/stage1.
multilingual_stage1() {
  local steps=$1
  step prepare "clean, deduplicate and split the text of examples/data" "$PYTHON" tools/prepare_data.py \
    --protocol examples/protocol/protocol.yaml --output-dir "$OUT/text" --workers 2
  step upcycle "cut every fourth FFN of $BASE into 4 LM experts" \
    fresh "$PYTHON" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" "$OUT/upcycled"
  step data "turn the text of eight languages into token files" tokenize_multilingual
  # shellcheck disable=SC2086
  step stage1 "$steps steps on monolingual text: LM experts and router" \
    train_mono stage1 "$steps" "$OUT/upcycled" en $LANGUAGES
}

tokenize_multilingual() {
  for language in en $LANGUAGES; do
    "$PYTHON" tools/preprocess_data.py mono --input "$OUT/text/mono.$language.train.txt.gz" \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/mono.$language"
  done
  for language in $LANGUAGES; do
    "$PYTHON" tools/preprocess_data.py parallel --input "$OUT/text/$language-en.train.tsv.gz" --both-directions \
      --source-language "$language" --target-language en --max-tokens $((SEQUENCE + 1)) \
      --tokenizer "$OUT/upcycled/tokenizer" --output-prefix "$OUT/data/$language-en"
  done
}

# train_pairs PHASE STEPS PARENT LR PAIR...: on these pairs, both directions of each; LR falls to a tenth. Without pairs
# TRAIN_FLAGS name the text.
train_pairs() {
  local phase=$1 steps=$2 parent=$3 lr=$4; shift 4
  [ $# -eq 0 ] || set -- --data-path "${@/#/"$OUT/data/"}"
  train "$phase" "$steps" "$parent" "$@" \
    --micro-batch-size "$PAIR_BATCH" --global-batch-size "$PAIR_BATCH" \
    --lr "$lr" --min-lr "$("$PYTHON" -c "print($lr / 10)")"
}

# train_mono PHASE STEPS PARENT LANGUAGE...: on the text of these languages.
train_mono() {
  local phase=$1 steps=$2 parent=$3; shift 3
  train "$phase" "$steps" "$parent" --data-path "${@/#/"$OUT/data/mono."}" --split 100,0,0 \
    --data-cache-path "$OUT/data/cache" --micro-batch-size "$MONO_BATCH" --global-batch-size "$MONO_BATCH" \
    --lr "$MONO_LR" --min-lr "$("$PYTHON" -c "print($MONO_LR / 10)")"
}

# evaluate_multilingual SEGMENTS NAME=DIR...: BASE and the named models in 14 directions and eight languages.
evaluate_multilingual() {
  local segments=$1 words=() system; shift
  for system in base="$BASE" "$@"; do words+=(--system "$system"); done
  for language in $LANGUAGES; do words+=(--test "$language-en=$OUT/text/$language-en.test.tsv.gz"); done
  for language in en $LANGUAGES; do words+=(--mono "$language=$OUT/text/mono.$language.test.txt.gz"); done
  "$PYTHON" tools/evaluate_translation.py --baseline base --dtype "$DTYPE" "${words[@]}" --both-directions \
    --limit "$segments" --mono-limit "$segments" --decoding greedy --max-length-ratio 2 --batch-size 64 \
    --output-dir "$OUT/evaluation"
}
