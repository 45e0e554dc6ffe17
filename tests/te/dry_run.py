"""The training command with --dry-run, on Transformer Engine's modules."""

from __future__ import annotations

import runpy

from tests.te.pretend import pretend_cuda

with pretend_cuda():
    runpy.run_path("tools/pretrain_mixmoe.py", run_name="__main__")
