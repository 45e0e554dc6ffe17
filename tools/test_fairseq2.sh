#!/usr/bin/env bash
# The tests of the fairseq2 integration, in an environment of its own that sees the packages of .venv behind it. Run by
# `make test-fairseq2`; words after the name of the script go to pytest. ONLY_SETUP=1 makes the environment and no more.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-fairseq2
# fairseq2 with what it imports here and .venv has not, or has in a version that fairseq2 refuses. pip cannot resolve it
# together with constraints.txt (fairseq2 declares another NumPy and pins small packages), hence --no-deps.
PACKAGES=(fairseq2==0.8.1 fairseq2n==0.8.1 tbb==2023.2.0 tcmlib==1.6.0 clusterscope==0.0.32 click-option-group==0.5.10
  editdistance==0.8.1 s3fs==2026.6.0 aiobotocore==3.10.0 botocore==1.43.117 aioitertools==0.13.0 jmespath==1.1.0
  wrapt==2.5.2 importlib_metadata==7.2.1 importlib_resources==6.5.2 zipp==4.1.2 rich==14.3.4 markdown-it-py==4.3.0
  mdurl==0.1.2 ruamel.yaml==0.19.1 blobfile==3.3.0 pycryptodomex==3.24.2 torcheval==0.0.7 packaging==24.2 psutil==5.9.8
  soundfile==0.14.0 cffi==2.1.1 pycparser==3.12)

if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$PWD ${PACKAGES[*]} $(cksum <pyproject.toml)" ]; then
  rm -rf "$VENV"
  .venv/bin/python -m venv "$VENV"
  site=$VENV/lib/python3.12/site-packages
  printf '%s\n' "$PWD/.venv/lib/python3.12/site-packages" >"$site/behind.pth"
  pip() { "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps "$@" >>"$VENV/setup.log" 2>&1; }
  rm -rf mixmoe_megatron.egg-info  # one of an older version would hide the entry point from what is started here
  # The package itself too: fairseq2 finds the extension among the entry points of what is installed.
  pip "${PACKAGES[@]}" && pip --no-build-isolation -e . ||
    { tail -5 "$VENV/setup.log" >&2; printf 'error: pip failed, its log is %s\n' "$VENV/setup.log" >&2; exit 1; }
  # fairseq2n is linked against a libsndfile of the system: the one inside soundfile serves as well.
  ln -s "python3.12/site-packages/_soundfile_data/libsndfile_$(uname -m).so" "$VENV/lib/libsndfile.so.1"
  printf '%s\n' "$PWD ${PACKAGES[*]} $(cksum <pyproject.toml)" >"$VENV/.complete"
fi
[ "${ONLY_SETUP:-}" != 1 ] || exit 0
[ $# -gt 0 ] || set -- tests/fairseq2
OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest -q "$@"
