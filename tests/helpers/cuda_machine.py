"""The training command with the flags of a CUDA machine, while CPU mode's stand-ins answer for the device alone.

`become` is a prelude of `tests.helpers.forked`: no Transformer Engine. With its stand-in, which Megatron must find when
it is imported, a process of its own forks the jobs: `python -m tests.helpers.cuda_machine JOBS.json`, a list of
[command line, directory of the logs, whether Apex is there].
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mixmoe_megatron import machine
from mixmoe_megatron.machine import Machine
from tests.helpers import forked, te_stand_in


def h100(transformer_engine: bool, apex: bool) -> Machine:
    """An H100 with a compiler, and what is asked for."""
    version = te_stand_in.VERSION if transformer_engine else None
    return Machine("H100", (9, 0), version, fused_wgrad=apex, flash_attention=False, compiler=True)


def become(pretended: Machine) -> None:
    """Let this process find that machine; gloo stands for NCCL, and what torch.compile would build runs as it is."""
    machine._read_machine = lambda: pretended
    torch._dynamo.config.disable = True
    init_process_group = torch.distributed.init_process_group

    def with_gloo(**kwargs: Any) -> None:
        assert kwargs["backend"] in ("nccl", "fake")
        init_process_group(**{**kwargs, "backend": "gloo" if kwargs["backend"] == "nccl" else "fake"})

    torch.distributed.init_process_group = with_gloo
    if pretended.fused_wgrad:
        _install_apex()


def _install_apex() -> None:
    from megatron.core.tensor_parallel import layers

    def add_wgrad(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad.T @ x)

    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_wgrad, wgrad_gemm_accum_fp16=add_wgrad
    )


def run_jobs(jobs: list[tuple[list[str], str, bool]]) -> None:
    """Run each job on a machine with the stand-in for Transformer Engine.

    Raises:
        AssertionError: one failed; the message holds its output.
    """
    te_stand_in.install()
    from tests.helpers import preload  # noqa: F401  # with Transformer Engine in place

    forked._context = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment,return-value]
    for words, logs, apex in jobs:
        forked.run_job(words, 1, Path(logs), prelude=partial(become, h100(transformer_engine=True, apex=apex)))


if __name__ == "__main__":
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))
