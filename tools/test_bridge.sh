#!/usr/bin/env bash
# The tests of Megatron-Bridge, in an environment of its own that sees those of .venv-te and .venv behind it. Called by
# `make test-bridge`, which makes .venv-te first, because Megatron-Bridge imports Transformer Engine. No GPU.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-bridge
WITH_THEIRS=(transformers==5.12.1)
# What Megatron-Bridge imports here. Left out: what it declares for other models, for services and for GPU kernels.
ALONE=(megatron-bridge==0.6.2 peft==0.21.2 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3 diffusers==0.42.1
  nvidia-modelopt==0.47.0 pulp==3.3.2 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2)

if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$PWD ${WITH_THEIRS[*]} ${ALONE[*]}" ]; then
  rm -rf "$VENV"
  .venv/bin/python -m venv "$VENV"
  site=$VENV/lib/python3.12/site-packages
  printf '%s\n' "$PWD"/.venv{-te,}/lib/python3.12/site-packages >"$site/behind.pth"
  ln -s "$PWD/.venv/lib/python3.12/site-packages/nvidia" "$site/nvidia" # where Transformer Engine looks for cuDNN
  pip() { "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" >>"$VENV/setup.log" 2>&1; }
  # pip reports that packages of .venv want an older hub: they are not used here.
  pip "${WITH_THEIRS[@]}" && pip --no-deps "${ALONE[@]}" ||
    { tail -5 "$VENV/setup.log" >&2; printf 'error: pip failed, its log is %s\n' "$VENV/setup.log" >&2; exit 1; }
  printf '%s\n' "$PWD ${WITH_THEIRS[*]} ${ALONE[*]}" >"$VENV/.complete"
fi
CUDA_HOME=$PWD/.venv-te/include OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest -q tests/bridge "$@"
