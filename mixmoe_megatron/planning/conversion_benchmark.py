"""Measure the conversion commands against `cp`: random checkpoints of real models' shapes, seconds, peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, from_float32
from mixmoe_megatron.checkpoint.output_dir import check_space
from mixmoe_megatron.checkpoint.safetensors_io import SafetensorsReader, write_safetensors
from mixmoe_megatron.checkpoint.stored import Region, lengths, whole
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.conversion.plan import expand
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import TABLES
from mixmoe_megatron.model.sizes import model_sizes

_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": _ROPE, "rms_norm_eps": 1e-5,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "rope_scaling": {**_ROPE, "factor": 8.0}, "tie_word_embeddings": False,
    },
    "tiny": {
        **_LLAMA3, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 2,
        "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
_PACKAGES = Path(__file__).resolve().parents[2]
_BLOCK = 1 << 24
# A small process in between: Linux counts what a process had before it became the command as the command's memory.
_WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stderr, seconds, used.ru_maxrss]))
"""


def write_random_model(directory: Path, config: dict[str, Any], copies: int = 1) -> int:
    """Write a Hugging Face directory of random bfloat16 weights, in files of at most 5 GB; return its bytes.

    Args:
        directory: to be made.
        config: its config.json.
        copies: for how many models as large as this one the disk must have room.

    Raises:
        MixMoEError: the disk has less.
    """
    noise = from_float32(np.random.default_rng(0).normal(0, 0.02, _BLOCK).astype(np.float32), "bfloat16")

    def bits(name: str, shape: tuple[int, ...], region: Region) -> Bits:
        """Each tensor has noise of its own; its rows, if they are long, have some in common."""
        start = zlib.crc32(f"{name} {region[0].start}".encode()) % _BLOCK
        return np.resize(np.roll(noise, -start), lengths(region))

    sizes = model_sizes(megatron_args_from_hf(config), None, 0)
    tensors = [tensor for unit in expand(TABLES["same"], sizes) for tensor in unit.hf]
    plan = [LazyTensor(name, shape, "bfloat16", partial(bits, name, shape)) for name, shape in tensors]
    total = sum(tensor.num_bytes for tensor in plan)
    check_space(directory, copies * total)
    directory.mkdir(parents=True)
    write_safetensors(directory, plan, 5 * 10**9)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return total


def _run(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; return its seconds and the peak memory of its largest process in GB.

    Raises:
        MixMoEError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(_PACKAGES)}
    watch = [sys.executable, "-I", "-c", _WATCH, *command]
    watched = subprocess.run(watch, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    status, said, seconds, kilobytes = json.loads(watched.stdout)
    if status:
        raise MixMoEError(f"{' '.join(command)} failed: {said[-2000:]}")
    return seconds, kilobytes / 1e6


def _read_all(directory: Path) -> float:
    start = time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as stream:
            block = bytearray(_BLOCK)
            while stream.readinto(block):
                pass
    return time.perf_counter() - start


def _check_same(one: Path, other: Path) -> None:
    """Raise unless two directories hold the same tensors, bit by bit; one tensor of each is in memory."""
    first, second = SafetensorsReader(one), SafetensorsReader(other)
    if set(first.names()) != set(second.names()):
        raise MixMoEError(f"{other} holds other tensors than {one}.")
    for name in first.names():
        everything = whole(first.shape(name))
        if not np.array_equal(first.read_region(name, everything), second.read_region(name, everything)):
            raise MixMoEError(f"{name} did not come back bit-equal.")


def measure_conversions(model: str, scratch: Path, kind: str, processes: int = 1, repeats: int = 5) -> dict[str, Any]:
    """Write a random model, time `cp` and a read, convert it to Megatron and back, several times in turn, and compare.

    Before each timing a copy is made and removed: memory that lay free for long is slow to get on a virtual machine,
    which would be put down to whoever comes first.

    Args:
        model: of MODELS.
        scratch: made, and left for the caller to remove.
        kind: `dense` (the way back is compared bit by bit) or `upcycled`.
        processes: of each conversion.
        repeats: of all.

    Returns:
        `gigabytes` of the model, and `steps`: each with name and the `seconds` of all turns, sorted; the conversions
        also with the largest `peak_gigabytes` of memory, and `ratio`, their best time over those of cp and read.

    Raises:
        MixMoEError: the disk has no room, a command failed, or a bit was lost.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    original, copy, checkpoint, back = (scratch / name for name in ("hf", "copy", "checkpoint", "back"))
    total = write_random_model(original, MODELS[model], copies=3)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch += ["-m", "mixmoe_megatron"]
    there = ["hf-to-megatron", "--hf-dir", str(original), "--output-dir", str(checkpoint)]
    there += ["--dense"] if kind == "dense" else []
    home = ["to-hf", "--checkpoint-dir", str(checkpoint), "--output-dir", str(back)]
    copying = ["cp", "-r", str(original), str(copy)]

    def timed(command: list[str]) -> tuple[float, float]:
        _run(copying)
        shutil.rmtree(copy)
        os.sync()
        return _run(command)

    turns = []
    for _ in range(repeats):
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
        cp, read = timed(copying), (_read_all(copy), 0.0)
        shutil.rmtree(copy)
        turns.append([cp, read, timed([*launch, *there]), timed([*launch, *home])])
    if kind == "dense":
        _check_same(original, back)
    names = ("cp", "read", "Hugging Face -> Megatron", "Megatron -> Hugging Face")
    steps: list[dict[str, Any]] = []
    for name, column in zip(names, zip(*turns, strict=True), strict=True):
        steps.append({"name": name, "seconds": sorted(seconds for seconds, _ in column)})
        if "->" in name:
            yardstick = sum(step["seconds"][0] for step in steps[:2])
            ratio, peak = steps[-1]["seconds"][0] / yardstick, max(peak for _, peak in column)
            steps[-1] |= {"ratio": ratio, "peak_gigabytes": peak}
    return {"model": model, "kind": kind, "processes": processes, "gigabytes": total / 1e9, "steps": steps}
