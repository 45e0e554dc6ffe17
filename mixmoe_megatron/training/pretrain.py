"""The training command: prepare this process for Megatron, then run (`run.py`)."""

from __future__ import annotations

import os
import sys
import warnings

from mixmoe_megatron.machine import order_device_queues
from mixmoe_megatron.megatron_patches.install import prepare_megatron


def main() -> None:
    """Run one stage of training; the command line is Megatron's plus `arguments.add_mixmoe_args`.

    Raises:
        MixMoEError: a wrong checkpoint, data file or option; one sentence.
    """
    stand_alone_environment()
    order_device_queues(sys.argv[1:])
    prepare_megatron()
    with warnings.catch_warnings():  # Megatron's optional packages, on import
        warnings.simplefilter("ignore")
        from mixmoe_megatron.training.run import run  # what it imports of Megatron must find the process prepared
    run(sys.argv[1:])


def stand_alone_environment() -> None:
    """Without torchrun (no RANK), be a job of one process, whose store takes any free port of this machine."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
