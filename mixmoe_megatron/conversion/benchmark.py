"""Measure the conversion commands against `cp`: random checkpoints of real models' shapes, seconds, peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.conversion.mappings import TABLES
from mixmoe_megatron.conversion.model_sizes import model_sizes
from mixmoe_megatron.conversion.output_dir import check_space
from mixmoe_megatron.conversion.plan import LazyTensor, expand
from mixmoe_megatron.conversion.safetensors_io import SafetensorsReader, write_safetensors
from mixmoe_megatron.errors import MixMoEError

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
_COMMANDS = Path(__file__).resolve().parents[2] / "checkpoints_conversion"
_BLOCK = 1 << 24


def write_random_model(directory: Path, config: dict[str, Any]) -> int:
    """Write a Hugging Face directory of random bfloat16 weights, in files of at most 5 GB; return its bytes.

    Args:
        directory: to be made.
        config: its config.json.
    """
    directory.mkdir(parents=True)
    noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        start = hash_of(name) % (_BLOCK // 2)
        count = torch.Size(shape).numel()
        repeats = -(-count // (_BLOCK - start))
        return noise[start:].repeat(repeats)[:count].view(shape)

    sizes = model_sizes(megatron_args_from_hf(config), None, "dense")
    tensors = [tensor for unit in expand(TABLES["same"], sizes) for tensor in unit.hf]
    plan = [LazyTensor(n, s, torch.bfloat16, lambda n=n, s=s: values(n, s)) for n, s in tensors]  # type: ignore[misc]
    write_safetensors(directory, plan, 5 * 10**9)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return sum(tensor.num_bytes for tensor in plan)


def hash_of(name: str) -> int:
    """Return a number that depends on a name alone, on every run."""
    return sum((position + 1) * 7919 * ord(letter) for position, letter in enumerate(name))


def _run(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; return its seconds and the peak memory of its largest process in GB.

    Raises:
        MixMoEError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(_COMMANDS.parent)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise MixMoEError(f"{' '.join(command)} failed: {said[-2000:]}")
    return seconds, usage.ru_maxrss / 1e6


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
        if not torch.equal(first.read(name).view(torch.int16), second.read(name).view(torch.int16)):
            raise MixMoEError(f"{name} did not come back bit-equal.")


def measure(model: str, scratch: Path, kind: str, processes: int = 1) -> dict[str, Any]:
    """Write a random model, time `cp` and a read, convert it to Megatron and back, and compare.

    Args:
        model: of MODELS.
        scratch: made, and left for the caller to remove.
        kind: `dense` (the way back is compared bit by bit) or `upcycled`.
        processes: of each conversion.

    Returns:
        `gigabytes` of the model, and `steps`: each with name, seconds, for the conversions also `peak_gigabytes` of
        memory, and `ratio` to cp and read together, `ratio_started` without the start of Python and torch.

    Raises:
        MixMoEError: the disk has no room, a command failed, or a bit was lost.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    original, copy, checkpoint, back = (scratch / name for name in ("hf", "copy", "checkpoint", "back"))
    total = sum(t.numel() for t in _shapes(MODELS[model])) * 2
    check_space(scratch, 3 * total)
    write_random_model(original, MODELS[model])
    os.sync()
    start_up = _run([sys.executable, "-c", "import torch"])[0]
    copying = _run(["cp", "-r", str(original), str(copy)])[0]
    os.sync()
    reading = _read_all(copy)
    shutil.rmtree(copy)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    parts = {"cp": copying, "read": reading, "(start Python and torch)": start_up}
    steps: list[dict[str, Any]] = [{"name": name, "seconds": seconds} for name, seconds in parts.items()]
    there = [str(_COMMANDS / "hf_to_mixmoe.py"), "--hf-dir", str(original), "--output-dir", str(checkpoint)]
    there += ["--dense"] if kind == "dense" else []
    home = [str(_COMMANDS / "mixmoe_to_hf.py"), "--checkpoint-dir", str(checkpoint), "--output-dir", str(back)]
    for name, words in (("Hugging Face -> Megatron", there), ("Megatron -> Hugging Face", home)):
        os.sync()
        seconds, peak = _run([*launch, *words])
        step = {"name": name, "seconds": seconds, "peak_gigabytes": peak}
        step["ratio"], step["ratio_started"] = ((seconds - less) / (copying + reading) for less in (0.0, start_up))
        steps.append(step)
    if kind == "dense":
        _check_same(original, back)
    return {"model": model, "kind": kind, "processes": processes, "gigabytes": total / 1e9, "steps": steps}


def _shapes(config: dict[str, Any]) -> list[torch.Size]:
    sizes = model_sizes(megatron_args_from_hf(config), None, "dense")
    return [torch.Size(shape) for unit in expand(TABLES["same"], sizes) for _, shape in unit.hf]
