# What the cluster examples share; each sets its variables and sources this file. From the repository's root:
#   sbatch examples/NAME/run.sh             all steps under Slurm; `sbatch --export=ALL,BASE=...` sets variables
#   bash examples/NAME/run.sh               all steps on one node, with torchrun
#   bash examples/NAME/run.sh STEP...       some of: convert preprocess stage1 stage2 export
# Several nodes without Slurm, on a shared file system: run convert and preprocess on one node, then
#   MASTER=host-of-the-first bash examples/NAME/run.sh stage1 (then stage2) on all of them, then export on one.
#   BASE=DIR             Hugging Face directory of the dense model
#   DATA=DIR             mono.LANGUAGE.train.txt.gz and LANGUAGE-en.train.tsv.gz, as tools/prepare_data.py makes them
#   OUT=runs/NAME        everything is written there; what is there already is not made again, training goes on
#   PRESET=recommended   or paper: mixmoe_megatron/model/README.md, D1 to D14
#   STAGE1_STEPS=10000   the paper gives no number; 1.3 x 10^9 tokens
#   STAGE2_STEPS=131250  4.2 million pairs once, in batches of 32
#   PRINT=1              print the commands, run nothing
set -euo pipefail
BASE="${BASE:?set BASE to the Hugging Face directory of $MODEL}"
DATA="${DATA:?set DATA to the directory that tools/prepare_data.py made}"
OUT="${OUT:-runs/$NAME}" PRESET="${PRESET:-recommended}"
STAGE1_STEPS="${STAGE1_STEPS:-10000}" STAGE2_STEPS="${STAGE2_STEPS:-131250}"
LANGUAGES="cs de ru tr zh fi et"  # each with English, both ways
PYTHON="${PYTHON:-.venv/bin/python}" PER_NODE=8 NODES=$((GPUS / 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" PYTHONPATH="$PWD"

run() { if [ -n "${PRINT:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# make FILE SCRIPT ARGUMENTS...: runs the script unless FILE, which it writes last, is there
make() {
  if [ -z "${PRINT:-}" ] && [ -e "$1" ]; then echo "$1 is there"; else run "$PYTHON" "${@:2}"; fi
}

launch() { # one launcher on each node
  local slurm=() nodes master="${MASTER:-localhost}"
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    # A step does not inherit its job's CPUs: without the number each launcher and its eight ranks would share one.
    slurm=(srun --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}")
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    master=${nodes%%$'\n'*}
  fi
  run "${slurm[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$PER_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$master:29500" --rdzv-id="${SLURM_JOB_ID:-$NAME}" "$@"
}

convert() {
  make "$OUT/upcycled" checkpoints_conversion/hf_to_mixmoe.py --hf-dir "$BASE" --output-dir "$OUT/upcycled" \
    --preset "$PRESET"
}

preprocess() { # stage 1: texts of more than 10 tokens; stage 2: pairs of 1 to 200 words a side
  local language tokenizer="$OUT/upcycled/tokenizer"
  run mkdir -p "$OUT/data"
  for language in $LANGUAGES en; do
    make "$OUT/data/mono.$language.json" tools/preprocess_data.py mono --tokenizer "$tokenizer" \
      --input "$DATA/mono.$language.train.txt.gz" --output-prefix "$OUT/data/mono.$language"
  done
  for language in $LANGUAGES; do
    make "$OUT/data/$language-en.json" tools/preprocess_data.py parallel --tokenizer "$tokenizer" \
      --source-language "$language" --target-language en --both-directions --max-tokens 1025 \
      --input "$DATA/$language-en.train.tsv.gz" --output-prefix "$OUT/data/$language-en"
  done
}

# train STAGE PARENT DIRECTORY FLAGS...: what both stages share; Table I and section IV-C of the paper
train() {
  local stage=$1 parent=$2 directory=$3; shift 3
  launch tools/pretrain_mixmoe.py --mixmoe-stage "$stage" --init-from "$parent" \
    --load "$directory" --save "$directory" --save-interval 1000 \
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather $LAYOUT \
    --optimizer adam --weight-decay 0.0 --clip-grad 1.0 --lr-decay-style cosine --lr-warmup-fraction 0.03 \
    --moe-aux-loss-coeff 0.01 --eval-iters 0 --log-interval 10 --log-throughput --seed 1234 \
    --tensorboard-dir "$directory/tensorboard" "$@"
}

stage1() {
  train 1 "$OUT/upcycled" "$OUT/stage1" --lr 2e-4 --global-batch-size 64 --micro-batch-size "$STAGE1_MICRO_BATCH" \
    --train-iters "$STAGE1_STEPS" --seq-length 2048 --split 100,0,0 --data-cache-path "$OUT/data/cache" \
    --data-path $(printf "$OUT/data/mono.%s " $LANGUAGES en)
}

stage2() {
  train 2 "$OUT/stage1" "$OUT/stage2" --lr 1e-5 --global-batch-size 32 --micro-batch-size "$STAGE2_MICRO_BATCH" \
    --train-iters "$STAGE2_STEPS" --seq-length 1024 --data-path $(printf "$OUT/data/%s-en " $LANGUAGES)
}

export_hf() {
  make "$OUT/hf" checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir "$OUT/stage2" --output-dir "$OUT/hf"
}

for step in ${*:-convert preprocess stage1 stage2 export}; do
  case $step in
    convert | preprocess | stage1 | stage2) $step ;;
    export) export_hf ;;
    *) echo "error: unknown step $step; the steps are convert preprocess stage1 stage2 export." >&2; exit 2 ;;
  esac
done
