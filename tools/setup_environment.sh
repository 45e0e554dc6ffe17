#!/usr/bin/env bash
# Make .venv: a Python 3.12 environment with the pinned, tested packages of constraints.txt. Called by `make setup`.
# Does nothing when .venv is complete and up to date. PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
LOG=$VENV/setup.log
STAMP=$VENV/.setup-complete  # written last: a half-finished install has none

say() { printf '[setup] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# An interpreter counts only when it runs, is 3.12 and can make an environment (a pyenv shim on PATH may do none of it).
usable() {
  "$1" -c 'import sys; assert sys.version_info[:2] == (3, 12)
import bz2, ctypes, ensurepip, lzma, ssl, venv, zlib' >/dev/null 2>&1
}

find_python() {
  local candidate root
  root=$(pyenv root 2>/dev/null || printf '%s' "${PYENV_ROOT:-$HOME/.pyenv}")
  for candidate in \
    "$(command -v python3.12 || true)" "$(command -v python3 || true)" "$(command -v python || true)" \
    "$root"/versions/3.12*/bin/python "$(uv python find 3.12 2>/dev/null || true)" \
    /usr/bin/python3.12 /usr/local/bin/python3.12 /opt/homebrew/bin/python3.12 \
    "$HOME"/miniconda3/bin/python "$HOME"/anaconda3/bin/python; do
    if [ -n "$candidate" ] && [ -x "$candidate" ] && usable "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

# Run a command in the background with its output in the log, and say every 15 seconds how far it is.
run_logged() {
  local what=$1 started=$SECONDS next=15 pid
  shift
  "$@" >>"$LOG" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null || true; say "interrupted; run make setup again to go on"; exit 130' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    if [ $((SECONDS - started)) -ge "$next" ]; then
      next=$((next + 15))
      say "$what: $((SECONDS - started)) s; $(progress "$what")"
    fi
  done
  trap - INT TERM
  wait "$pid" || explain_failure "$what"
}

progress() {
  if [ "$1" != install ]; then
    printf 'still at it'
  elif grep -q '^Installing collected packages' "$LOG"; then
    printf '%d packages unpacked' "$(find "$VENV"/lib/python3.12/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)"
  else
    grep -oE '^ *(Collecting|Downloading|Building|Using cached) [^ ]+' "$LOG" | tail -1 | sed 's/^ *//' || true
  fi
}

explain_failure() {
  local unreachable='Retrying \(Retry|NewConnectionError|name resolution|Network is unreachable|ConnectTimeout'
  tail -15 "$LOG" >&2
  if grep -qiE 'no space left' "$LOG"; then
    fail "the disk is full: the environment needs about 8 GB. The log is $LOG."
  elif grep -qE "$unreachable" "$LOG"; then
    fail "the Python package index cannot be reached, and setup needs it once (pip's mirror settings apply; log: $LOG)."
  fi
  fail "$1 failed, the reason is above and in $LOG; \`make clean-venv setup\` starts anew."
}

# The third-party packages are imported for good: `pip check` passes on sets that break at import.
verify() {
  "$VENV/bin/mixmoe" --help >>"$LOG" 2>&1 || return
  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$VENV/bin/python" -W ignore - >>"$LOG" 2>&1 <<'PY'
import megatron.core, megatron.training  # noqa: E401
import accelerate, comet, datasets, matplotlib, sacrebleu, sentencepiece, tensorboard, torch, transformers  # noqa: E401
import mixmoe_megatron

print("torch", torch.__version__, "megatron-core", megatron.core.__version__, "transformers", transformers.__version__)
PY
}

fingerprint=$(cat pyproject.toml constraints.txt tools/setup_environment.sh | cksum)
fingerprint="$fingerprint $PWD"  # an environment does not survive a move
if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$fingerprint" ]; then
  exit 0
fi

if [ -n "${PYTHON:-}" ]; then
  usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12 with the ssl, venv and ensurepip modules."
  python=$PYTHON
else
  python=$(find_python) || fail "no usable Python 3.12 found on PATH, in pyenv, uv, conda or the system folders:" \
    "install one (\`pyenv install 3.12\`, \`uv python install 3.12\`) or set PYTHON=/path/to/python3.12."
fi

# An environment that works, has pip and was made in this very folder is completed; any other is made anew.
reusable() {
  usable "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
    head -3 "$VENV/bin/pip" | grep -qF "$PWD/$VENV/"
}

rm -f "$STAMP"
if ! reusable; then
  rm -rf "$VENV"
  say "making $VENV with $("$python" --version)"
  "$python" -m venv "$VENV"
fi
: >"$LOG"
say "installing the pinned packages: about 4 minutes and 8 GB the first time (log: $LOG)"
run_logged "install" "$VENV/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
say "checking that the packages import"
run_logged "import check" verify
printf '%s\n' "$fingerprint" >"$STAMP"
say "done in $SECONDS s: $(tail -1 "$LOG")"
