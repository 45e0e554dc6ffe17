#!/usr/bin/env bash
# The Hugging Face tests on transformers 5.x, in an environment of its own that sees .venv's packages behind its own.
# Called by `make test-transformers5`; words after the script's name go to pytest (`-m slow` adds torch's inductor).
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-transformers5
PACKAGES=(transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0 peft==0.21.2)

if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$PWD ${PACKAGES[*]}" ]; then
  rm -rf "$VENV"
  .venv/bin/python -m venv "$VENV"
  printf '%s\n' "$PWD"/.venv/lib/python3.12/site-packages > "$VENV"/lib/python3.12/site-packages/behind.pth
  # pip reports that unbabel-comet and datasets want an older hub: neither is used here.
  "$VENV/bin/python" -m pip install --disable-pip-version-check "${PACKAGES[@]}" >"$VENV/setup.log" 2>&1 ||
    { tail -5 "$VENV/setup.log" >&2; printf 'error: pip failed, its log is %s\n' "$VENV/setup.log" >&2; exit 1; }
  printf '%s\n' "$PWD ${PACKAGES[*]}" > "$VENV/.complete"
fi
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -q -m "not slow" \
  tests/unit/test_hf_{capture,configuration,experts,generation,loading,model,training}.py "$@"
