"""Time and peak memory of training steps, several systems side by side, each in a process of its own.

The processes live together and take turns, so that all meet the same machine; a peak is that of one system alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.megatron_patches.install import prepare_megatron
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.flops import step_flops
from mixmoe_megatron.planning.parameters import count_parameters

_LONGEST_TEMPORARY_FOLDER = 70  # of the 107 characters of a socket's path; the server's own folder and name follow
_ENGINE_MODULE = "mixmoe_megatron.training.engine_step"
WARMUP = 2  # steps of each system that do not count


@dataclass(frozen=True)
class Task:
    """What every system trains on.

    Attributes:
        hf_dir: holds config.json of the dense base.
        batch_size: sequences a step.
        seq_length: tokens a sequence.
        flags: more flags of the training command.
        loss_share: of a sequence's tokens, its last ones, those that carry loss in phases that train on parallel text.
    """

    hf_dir: str
    batch_size: int
    seq_length: int
    flags: str = ""
    loss_share: float = 1.0

    def share(self, system: System) -> float:
        """Return the share of the tokens with logits in a system's step."""
        has_targets = system.engine and "parallel" in PHASES[system.phase].data and not system.all_logits
        return self.loss_share if has_targets else 1.0


@dataclass(frozen=True)
class System:
    """Something whose training step is measured.

    Attributes:
        name: in the table.
        phase: name of the phase that trains.
        engine: in the engine of this package; False: in plain transformers, the phase `dense` only.
        frozen_prefix: the frozen layers below the first MoE layer build no graph.
        fused: transformers with torch's fused AdamW.
        all_logits: all tokens carry loss, so that logits of all rows are computed.
    """

    name: str
    phase: str = "dense"
    engine: bool = True
    frozen_prefix: bool = True
    fused: bool = False
    all_logits: bool = False


PLAIN = (System("transformers, AdamW", engine=False), System("transformers, fused AdamW", engine=False, fused=True))
ENGINE = (
    System("engine, dense, all trained"),
    System("engine, stage 1", "stage1"),
    System("engine, stage 2", "stage2"),
    System("stage 1, graph from the bottom", "stage1", frozen_prefix=False),
    System("stage 2, graph from the bottom", "stage2", frozen_prefix=False),
)
LOGITS = (
    ENGINE[0],
    System("dense, logits of all rows", all_logits=True),
    ENGINE[2],
    System("stage 2, logits of all rows", "stage2", all_logits=True),
)


def measure_steps(systems: tuple[System, ...], task: Task, count: int) -> dict[str, dict[str, float]]:
    """Run all systems' steps in turn.

    Args:
        systems: what to measure.
        task: what they train on.
        count: measured steps of each.

    Returns:
        For each name: `seconds` and `cpu_seconds` of a step (medians), `peak_bytes` (most memory in a step, over what
        the process held before the model was built), `built_bytes` (of it before the first step: weights and gradient
        buffers), `flops` (the least that the step has to do, `flops.step_flops`), `parameters`, of them `trained` and
        `active`, the ones that a token meets.

    Raises:
        MixMoEError: a process failed; its reason stands above.
    """
    workers = [_Worker(system, task) for system in systems]
    try:
        built = [worker.receive() for worker in workers]
        times = [[worker.ask("step") for worker in workers] for _ in range(WARMUP + count)][WARMUP:]
        peaks = [worker.ask("peak") for worker in workers]
    finally:
        for worker in workers:
            worker.end()
    rows = {}
    for index, system in enumerate(systems):
        wall, cpu = (median(row[index][kind] for row in times) for kind in (0, 1))
        times_and_bytes = {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peaks[index], "built_bytes": built[index]}
        rows[system.name] = times_and_bytes | _counts(system, task)
    return rows


def _counts(system: System, task: Task) -> dict[str, float]:
    """Operations of a step, and parameters: all, those that train, those that a token meets."""
    phase = PHASES[system.phase]
    start = describe_start(read_hf_config(task.hf_dir), PHASES[phase.starts_from[0]])
    model = replace(start, phase=phase)
    tokens = task.batch_size * task.seq_length
    k, share = model.topk_per_group, task.share(system)
    flops = step_flops(model.sizes, phase, k, tokens, task.seq_length, loss_share=share).total
    counts = count_parameters(model)
    return {"flops": flops, "parameters": counts.total, "trained": counts.trained, "active": counts.active}


def _context() -> Any:
    """How processes are started: forks save an import of Megatron each, but a process that has used CUDA has none.

    The server of forks listens at a socket below the temporary folder, and the path of a socket is short.
    """
    if torch.cuda.is_available() or len(tempfile.gettempdir()) > _LONGEST_TEMPORARY_FOLDER:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, _ENGINE_MODULE])
    return context


class _Worker:
    """A process that builds one system and steps when it is asked to."""

    def __init__(self, system: System, task: Task):
        context = _context()
        self.system, (self.connection, there) = system, context.Pipe()
        self.process = context.Process(target=_serve, args=(there, system, task), daemon=True)
        self.process.start()
        self.is_done = False
        there.close()

    def ask(self, what: str) -> Any:
        with suppress(BrokenPipeError):  # it failed: the answer says so
            self.connection.send(what)
        answer = self.receive()
        self.is_done = what == "peak"
        return answer

    def end(self) -> None:
        """Let a process that has told its peak end by itself, which removes its temporary files; stop any other."""
        self.process.join(10.0 if self.is_done else 0.0)
        self.process.kill()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise MixMoEError(f"the process of {self.system.name!r} failed; its error stands above.") from None


def _serve(connection: Connection, system: System, task: Task) -> None:
    """The process: report what the built model takes, then answer "step" and "peak"."""
    try:
        os.dup2(2, 1)  # what Megatron and gloo print is no result
        prepare_megatron()
        importlib.import_module(_ENGINE_MODULE)  # Megatron, now that it is prepared; its memory is not the model's
        before = _memory()[0]
        step = _make_step(system, task)
        connection.send(_memory()[0] - before)
        _reset_peak()
        while connection.recv() == "step":
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            torch.cuda.synchronize()  # in CPU mode it does nothing
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))
        connection.send(_memory()[1] - before)
    except Exception:
        traceback.print_exc()


def _make_step(system: System, task: Task) -> Callable[[], Any]:
    from mixmoe_megatron.training.engine_step import engine_step, random_batch

    config = read_hf_config(task.hf_dir)
    batch = random_batch(config["vocab_size"], task.batch_size, task.seq_length, task.share(system))
    if system.engine:
        return engine_step(config, batch, PHASES[system.phase], task.flags, system.frozen_prefix)
    return _plain_step(task.hf_dir, batch, system.fused)


def _plain_step(hf_dir: str, batch: dict[str, torch.Tensor], fused: bool) -> Callable[[], None]:
    """Return a training step of the dense model in plain transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_dir), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _memory() -> tuple[int, int]:
    """Return the bytes held now and at the peak: of the GPU's memory, without CUDA of this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    now, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM := VmRSS
