#!/usr/bin/env bash
# All but COMET, which has no such release, on NumPy 2 and transformers 5.x: the unit, parity and quick distributed
# tests, in an environment of its own that sees .venv's packages behind its own. Called by `make test-transformers5`;
# words after the script's name go to pytest in place of those folders.
# PYTHON=/path/to/python3.13 makes an environment of that interpreter, with all packages of its own (8 GB).
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

PACKAGES=(numpy==2.5.5 transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==1.33.0 peft==0.21.2)
# What is not pinned above is as in .venv, but for what only COMET holds back, and what the hub's release does without.
NOT_PINNED='^(numpy|transformers|tokenizers|huggingface_hub|protobuf|pyarrow|sentencepiece|setuptools|unbabel-comet)=='
PYTHON=${PYTHON:-.venv/bin/python}
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV=.venv-transformers5 OWN=()
if [ "$version" != 3.12 ]; then
  VENV=.venv-transformers5-$version OWN=(-e '.[data,eval,langid,meteor]' pytest pytest-timeout pytest-xdist)
fi

if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$PWD ${PACKAGES[*]}" ]; then
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV"
  if [ "$version" = 3.12 ]; then
    printf '%s\n' "$PWD"/.venv/lib/python3.12/site-packages > "$VENV"/lib/python3.12/site-packages/behind.pth
  fi
  grep -vE "$NOT_PINNED|^#" constraints.txt >"$VENV/constraints.txt"
  # pip reports that unbabel-comet wants older packages: it is not used here.
  "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$VENV/constraints.txt" "${PACKAGES[@]}" \
    ${OWN[@]+"${OWN[@]}"} >"$VENV/setup.log" 2>&1 ||
    { tail -5 "$VENV/setup.log" >&2; printf 'error: pip failed, its log is %s\n' "$VENV/setup.log" >&2; exit 1; }
  printf '%s\n' "$PWD ${PACKAGES[*]}" > "$VENV/.complete"
fi
[ $# -gt 0 ] || set -- -n "${WORKERS:-2}" --dist loadfile tests/unit tests/parity tests/distributed
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -q -m "not slow" -k "not comet" "$@"
