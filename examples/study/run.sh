#!/usr/bin/env bash
# The paper's tables: each system trained several times, and which claims hold. What is trained: study.yaml.
#   TABLE=VII          tables of study.yaml, several in quotes, or all
#   SEEDS=3            trainings of each system
#   MINUTES=12         training steps and test segments grow with it
#   PAIRS=de-en        language pairs, several in quotes: those of examples/data
#   SIZE=toy           or small, real, gpu: of study.yaml
#   BASE=DIR           dense Hugging Face Llama or Qwen2 directory (default: the size's own)
#   WORKERS=2          jobs at a time; they share the cores
#   LAUNCHER=          before each job's command, such as "srun --gpus 1": then Slurm says where it runs
#   MATCH=tokens       all train for the same steps; flops: for the same operations as Mix-MoE;
#                      parameters: LoRA and LLaMA-Pro train as many as Mix-MoE does at a time
#   DTYPE=auto         float32, bfloat16, float16; auto: the fast one here
#   RATES=1            no tables: train each of their methods at three learning rates, compare them on the valid files
#   DRY=1              say what would be run, how long and how much it takes; run nothing
#   OUT=runs/study     everything is written there; the same command goes on there
set -euo pipefail
BASE="${BASE:+$(realpath -m "$BASE")}" OUT="${OUT:+$(realpath -m "$OUT")}"  # relative to where the user stands
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
words=()
[ -z "${DRY:-}" ] || words+=(--dry-run)
[ -z "${RATES:-}" ] || words+=(--choose-rates)
# shellcheck disable=SC2086
PYTHONPATH="$PWD" exec .venv/bin/python tools/study.py --table ${TABLE:-VII} --seeds "${SEEDS:-3}" \
  --minutes "${MINUTES:-12}" --pairs ${PAIRS:-de-en} --size "${SIZE:-toy}" --base "$BASE" \
  --match "${MATCH:-tokens}" --dtype "${DTYPE:-auto}" --workers "${WORKERS:-2}" --launcher "${LAUNCHER:-}" \
  --output-dir "${OUT:-runs/study}" "${words[@]}"
