#!/usr/bin/env python3
"""Train one stage of Mix-MoE with stock Megatron. Run it with torchrun; `--help` lists Megatron's flags and ours."""

from __future__ import annotations

import sys

from mixmoe_megatron.cli import run_command, setup_logging


def main() -> int:
    """Run the command with the words of `sys.argv`, where Megatron looks for them; return its exit status."""
    from mixmoe_megatron.training import pretrain

    setup_logging()
    return run_command(pretrain.main)


if __name__ == "__main__":
    sys.exit(main())
