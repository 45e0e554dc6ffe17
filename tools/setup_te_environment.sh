#!/usr/bin/env bash
# Make .venv-te: the packages of .venv plus Transformer Engine, for the structure tests of tests/te. Called by
# `make test-te`; needs no GPU. Does nothing when .venv-te is complete; an interrupted build goes on where it was.
#
# Transformer Engine's core is a wheel, its binding to PyTorch comes as source. That binding is compiled here from the
# registry's own source without optimisation, behind a precompiled header: minutes instead of a quarter of an hour.
# What it computes with lies in the core; on a GPU machine install it as README says.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VERSION=2.9.0  # later ones want newer cuDNN headers than torch 2.9 brings
BASE=$PWD/.venv
VENV=$PWD/.venv-te
SITE=$VENV/lib/python3.12/site-packages
BUILD=$VENV/build
LOG=$VENV/setup.log
STAMP=$VENV/.setup-complete  # written last: a half-finished install has none

say() { printf '[setup-te] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
pip() { "$VENV/bin/python" -m pip "$@" --disable-pip-version-check -c constraints.txt >>"$LOG" 2>&1; }

logged() {
  local what=$1 started=$SECONDS
  shift
  say "$what"
  if ! "$@" >>"$LOG" 2>&1; then
    tail -15 "$LOG" >&2
    grep -qiE 'no space left' "$LOG" && fail "the disk is full: .venv-te needs about 3 GB while it is built."
    fail "\"$what\" failed, the reason is above and in $LOG; make test-te goes on from there."
  fi
  say "  done in $((SECONDS - started)) s"
}

check_machine() {
  local cuda
  [ "$(uname -sm)" = "Linux x86_64" ] || fail "Transformer Engine's wheels are for x86-64 Linux, this is $(uname -sm)."
  command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install g++ (Debian: apt-get install g++) or set CXX."
  cuda=$("$BASE/bin/python" -c 'import torch; print(torch.version.cuda)')
  case $cuda in
    12.*) ;;
    *) fail "the binding needs the headers of a CUDA 12 build of torch, and .venv holds one with CUDA $cuda:" \
      "let \`make clean-venv setup\` install torch from the package index." ;;
  esac
}

# An environment of its own that also sees .venv: its packages are neither copied nor touched.
make_environment() {
  if ! "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then
    rm -rf "$VENV"
    "$BASE/bin/python" -m venv --without-pip "$VENV"
    printf 'import site; site.addsitedir("%s")\n' "$BASE/lib/python3.12/site-packages" >"$SITE/base.pth"
    ln -s "$BASE/lib/python3.12/site-packages/nvidia" "$SITE/nvidia"  # where Transformer Engine looks for cuDNN
  fi
  mkdir -p "$BUILD/objects"
}

install_wheels() {
  pip install --no-deps "transformer-engine==$VERSION" "transformer-engine-cu12==$VERSION" &&
    pip install einops==0.8.2 onnx==1.22.0 onnxscript==0.7.2 nvdlfw-inspect==0.2.2 &&
    # Headers alone, kept out of the way of .venv's nvidia packages.
    pip install --no-deps --upgrade --target "$BUILD/cuda" \
      "nvidia-cuda-nvcc-cu12==12.8.93" "nvidia-cuda-cccl-cu12==12.8.90" "wheel==0.45.1"
}

fetch_source() {
  [ -d "$BUILD/source" ] && return
  rm -rf "$BUILD/unpacked" && mkdir -p "$BUILD/unpacked"
  CUDA_HOME=$BUILD/cuda/nvidia/cuda_nvcc PYTHONPATH=$BUILD/cuda pip download --no-deps --no-build-isolation \
    --no-binary :all: -d "$BUILD" "transformer-engine-torch==$VERSION" || return
  tar -xf "$BUILD/transformer_engine_torch-$VERSION.tar.gz" --strip-components 1 -C "$BUILD/unpacked" &&
    mv "$BUILD/unpacked" "$BUILD/source"
}

# Compile a file of the source, or the header in front of all ("prefix.h"), unless that is done. Objects appear whole.
compile() {
  local file=$1 object=$BUILD/objects/${1//\//_}.o language=()
  if [ "$file" = prefix.h ]; then
    object=$BUILD/prefix.h.gch language=(-x c++-header)
    echo '#include "extensions.h"' >"$BUILD/prefix.h"
    file=$BUILD/prefix.h
  else
    language=(-include "$BUILD/prefix.h")
  fi
  [ -e "$object" ] && return
  # shellcheck disable=SC2086  # several flags
  "${CXX:-g++}" $FLAGS "${language[@]}" -c -o "$object.tmp" "$file" && mv "$object.tmp" "$object"
}

compile_binding() {
  local torch=$BASE/lib/python3.12/site-packages/torch jobs memory
  FLAGS="-std=c++17 -O0 -g0 -w -fPIC -fvisibility=hidden -DTORCH_API_INCLUDE_EXTENSION_H"
  FLAGS+=" -DTORCH_EXTENSION_NAME=transformer_engine_torch -I$BUILD/source/csrc"
  FLAGS+=" -I$BUILD/source/common_headers -I$BUILD/source/common_headers/common"
  FLAGS+=" -I$BUILD/source/common_headers/common/include -I$torch/include -I$torch/include/torch/csrc/api/include"
  FLAGS+=" -I$("$BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  CPATH=$(printf '%s:' "$BUILD"/cuda/nvidia/*/include "$BASE"/lib/python3.12/site-packages/nvidia/*/include)
  export BUILD FLAGS CPATH
  export -f compile
  memory=$(awk '/MemAvailable/ { print int($2 / 3000000) + 1 }' /proc/meminfo)  # 3 GB a compiler
  jobs=${MAX_JOBS:-$(nproc)}
  compile prefix.h &&
    (cd "$BUILD/source" && find csrc -name '*.cpp' | sort |
      xargs -n 1 -P "$((jobs < memory ? jobs : memory))" bash -c 'compile "$0"') &&
    "${CXX:-g++}" -shared "$BUILD"/objects/*.o -L"$torch/lib" -Wl,--no-as-needed -lc10 -ltorch -ltorch_cpu \
      -ltorch_python -o "$BUILD/binding.so" &&
    mv "$BUILD/binding.so" "$SITE/transformer_engine/wheel_lib/transformer_engine_torch.so"
}

verify() {
  CUDA_HOME=$VENV/include OMP_NUM_THREADS=1 "$VENV/bin/python" -W ignore -c '
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
enable_cpu_mode()
import transformer_engine.pytorch
from megatron.core.extensions.transformer_engine import HAVE_TE
assert HAVE_TE'
}

torch=$(cd "$BASE/lib/python3.12/site-packages" && echo torch-*.dist-info)  # what the binding is compiled against
fingerprint="$(cksum <tools/setup_te_environment.sh) $torch $PWD"
[ "$(cat "$STAMP" 2>/dev/null)" = "$fingerprint" ] && exit 0
check_machine
make_environment
: >"$LOG"
logged "installing Transformer Engine $VERSION and what it imports (about 0.9 GB)" install_wheels
logged "fetching the source of its binding to PyTorch" fetch_source
logged "compiling the binding: about 3 minutes on 2 idle cores (log: $LOG)" compile_binding
logged "checking that it imports" verify
rm -rf "$BUILD"
printf '%s\n' "$fingerprint" >"$STAMP"
