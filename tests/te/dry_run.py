"""The training command with --dry-run, on Transformer Engine's modules and, but for these, with CPU mode's flags."""

from __future__ import annotations

import runpy
from unittest import mock

from mixmoe_megatron import machine
from tests.te.pretend import pretend_cuda

with mock.patch.object(machine, "_read_machine", machine.Machine), pretend_cuda():
    runpy.run_path("tools/pretrain_mixmoe.py", run_name="__main__")
