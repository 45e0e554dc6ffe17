#!/usr/bin/env python3
"""Print, one word a line, the flags of model and GPU that a stock `pretrain_gpt.py` needs to train a stage of Mix-MoE.

flags.py STAGE FLAGS...     FLAGS: the run's own (--pretrained-checkpoint, --load, --tensor-model-parallel-size ...)
"""

from __future__ import annotations

import sys

from mixmoe_megatron.cli import run_command
from mixmoe_megatron.errors import MixMoEError


def main() -> None:
    """Print the flags.

    Raises:
        MixMoEError: no stage, or no fitting checkpoint.
    """
    from mixmoe_megatron.integrations.stock_megatron import stock_flags

    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{__doc__}\n")
        return
    if sys.argv[1:2] not in (["1"], ["2"]):
        raise MixMoEError("the first word must be the stage, 1 or 2 (flags.py STAGE FLAGS...).")
    sys.stdout.write("\n".join(stock_flags(int(sys.argv[1]), sys.argv[2:])) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
