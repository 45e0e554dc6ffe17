"""What a machine has decides Megatron's flags; what it cannot use is told in one sentence."""

from __future__ import annotations

import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixmoe_megatron import machine
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import Machine
from mixmoe_megatron.megatron_patches import compilation, install
from tests.helpers.forked import ROOT

FULL = Machine("H100", (9, 0), "2.9.0", fused_wgrad=True, flash_attention=True, compiler=True)


@pytest.mark.parametrize(
    ("lacks", "flags"),
    [
        ({}, ""),
        ({"flash_attention": False}, ""),
        ({"fused_wgrad": False}, "--no-gradient-accumulation-fusion"),
        (
            {"transformer_engine": None},
            "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion --no-persist-layer-norm",
        ),
        ({"compiler": False}, "--disable-jit-fuser --no-bias-swiglu-fusion --no-bias-dropout-fusion"),
    ],
)
def test_what_is_missing_takes_its_flags_with_it(lacks: dict[str, object], flags: str) -> None:
    assert Machine(**{**vars(FULL), **lacks}).flags() == flags.split()


def test_a_machine_without_cuda_lacks_them_all() -> None:
    flags = Machine().flags()
    assert flags[:2] == ["--distributed-backend", "gloo"] and "--use-cpu-initialization" in flags
    assert {"--transformer-impl", "--no-gradient-accumulation-fusion", "--disable-jit-fuser"} <= set(flags)


def test_one_line_tells_facts_and_flags_on_rank_0(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = Machine("A100", (8, 0), None, fused_wgrad=False, flash_attention=False, compiler=True)
    monkeypatch.setattr(machine, "_read_machine", lambda: there)
    caplog.set_level(logging.INFO, "mixmoe_megatron.machine")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        machine.this_machine.cache_clear()
        assert machine.this_machine() is machine.this_machine() is there
    machine.this_machine.cache_clear()
    (line,) = caplog.messages
    assert line.startswith(
        "machine: A100 (compute capability 8.0), no Transformer Engine, no Apex, no flash-attn, C compiler; flags: "
    )
    assert line.endswith("--no-gradient-accumulation-fusion") and "--transformer-impl local" in line


def test_a_transformer_engine_that_does_not_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for broken, told in (
        ("raise OSError('undefined symbol:\\n _ZNK2at')", r"\(OSError: undefined symbol: _ZNK2at\)"),
        ("", r"\(ModuleNotFoundError: No module named 'transformer_engine.pytorch'\)"),
    ):
        (package / "__init__.py").write_text(broken)
        with pytest.raises(MixMoEError, match=f"installed but cannot be imported {told}: .*--no-build-isolation") as e:
            machine._transformer_engine()
        assert "\n" not in str(e.value)
        sys.modules.pop("transformer_engine", None)


def test_a_transformer_engine_that_imports_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._transformer_engine() is None
    found = types.ModuleType("transformer_engine")
    found.__version__, found.__path__ = "2.9.0", []
    found.__spec__ = types.SimpleNamespace(name="transformer_engine")
    fp8 = types.ModuleType("transformer_engine.pytorch.fp8")
    fp8.fp8_model_init = None
    for name, module in {"": found, ".pytorch": types.ModuleType("pytorch"), ".pytorch.fp8": fp8}.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    assert machine._transformer_engine() == "2.9.0"


def test_a_compiler_needs_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", sys.executable)
    assert machine._has_compiler()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not machine._has_compiler()
    monkeypatch.setenv("CC", sys.executable)
    (tmp_path / "Python.h").unlink()
    assert not machine._has_compiler()


@pytest.mark.parametrize(
    ("words", "queues"),
    [
        ("--expert-model-parallel-size 4", None),
        ("--tensor-model-parallel-size 1 --context-parallel-size=1", None),
        ("--tensor-model-parallel-size 2", "1"),
        ("--context-parallel-size=2 --lr 1e-3", "1"),
        ("--context-parallel-size", None),  # Megatron's parser says what is wrong
    ],
)
def test_device_queues_are_ordered_for_tensor_and_context_parallelism(
    words: str, queues: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    machine.order_device_queues(words.split())
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    machine.order_device_queues(words.split())
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32", "the user's number stays"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Machine], None]]:
    """Let this process be on a machine; what `prepare_megatron` changes is put back."""
    from megatron.core.datasets import utils

    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)
    with torch._dynamo.config.patch(disable=False):
        yield lambda there: monkeypatch.setattr(install, "this_machine", lambda: there)


def test_another_megatron_is_refused_on_every_machine(
    on: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.core.__version__", "0.20.1")
    for there in (FULL, Machine()):
        on(there)
        with pytest.raises(MixMoEError, match=r"supports megatron-core 0\.19\.x, found 0\.20\.1: install"):
            install.prepare_megatron()


def test_without_a_compiler_nothing_is_compiled(on: Callable[[Machine], None]) -> None:
    for there in (FULL, Machine(**{**vars(FULL), "compiler": False})):
        on(there)
        install.prepare_megatron()
        assert torch._dynamo.config.disable is not there.compiler


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_dataset_helpers_are_taken_as_they_are(
    compiled: bool, on: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they do not import Megatron's own way stays; its wheel has them, and no Makefile to compile them with."""
    from megatron.core.datasets import utils

    def make() -> None:
        raise SystemExit(1)

    monkeypatch.setattr(utils, "compile_helpers", make)
    monkeypatch.setattr(
        compilation, "can_import", lambda module: compiled and module == "megatron.core.datasets.helpers_cpp"
    )
    on(FULL)
    install.prepare_megatron()
    assert (utils.compile_helpers is make) is not compiled
    if compiled:
        assert utils.compile_helpers() is None


def test_one_version_of_transformer_engine_is_told_everywhere() -> None:
    version = re.search(r"==([0-9.]+)'", machine.INSTALL_TRANSFORMER_ENGINE).group(1)
    assert f'te = ["transformer-engine[pytorch]=={version}"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"\nVERSION={version} " in (ROOT / "tools/setup_te_environment.sh").read_text("utf-8")
    for told in (machine.INSTALL_TRANSFORMER_ENGINE, (ROOT / "README.md").read_text("utf-8")):
        assert "pip install --no-build-isolation" in told
