#!/usr/bin/env python3
"""Train one stage of Mix-MoE with stock Megatron. Run it with torchrun; `--help` lists Megatron's flags and ours."""

from __future__ import annotations

import sys

from mixmoe_megatron.cli import run_command, setup_logging
from mixmoe_megatron.training.pretrain import main

if __name__ == "__main__":
    setup_logging()
    sys.exit(run_command(main))
