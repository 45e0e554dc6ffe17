"""The dtype that a machine computes fast, as a function of its facts, and what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmoe_megatron import dtypes
from mixmoe_megatron.dtypes import Choice, choose, choose_device, choose_dtype, cpu_flags, fastest_dtype, training_note
from mixmoe_megatron.errors import MixMoEError

NO_FLAGS: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("gpu_bfloat16", "flags", "expected"),
    [
        (None, {"avx2", "avx512_bf16"}, "bfloat16"),
        (None, {"amx_bf16", "amx_tile"}, "bfloat16"),
        (None, {"amx_bf16", "avx512_bf16", "avx512_fp16"}, "bfloat16"),
        (None, {"avx512_bf16", "avx512_fp16"}, "float32"),
        (None, {"avx512f", "avx512_vnni"}, "float32"),
        (None, NO_FLAGS, "float32"),
        (True, NO_FLAGS, "bfloat16"),
        (False, {"avx512_bf16"}, "float32"),
    ],
)
def test_fastest_dtype(gpu_bfloat16: bool | None, flags: set[str], expected: str) -> None:
    assert fastest_dtype(gpu_bfloat16, flags).dtype == expected


def test_flags_are_whole_words_of_the_first_cpu(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu avx512_bf16_x\n\nflags\t\t: avx512_bf16\n", "utf-8"
    )
    assert cpu_flags(file) == {"fpu", "avx512_bf16_x"}
    assert cpu_flags(tmp_path / "nothing") == NO_FLAGS


def test_this_machine_as_torch_sees_it() -> None:
    assert ("avx512_bf16" in cpu_flags()) == torch.cpu._is_avx512_bf16_supported()


def test_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    with caplog.at_level("INFO", logger=dtypes.__name__):
        assert choose("auto", "cpu") == ("bfloat16", "cpu")
        assert choose("float16", "cpu") == ("float16", "cpu")
    assert [record.message for record in caplog.records] == [
        "computing in bfloat16 on cpu: the CPU has avx512_bf16",
        "computing in float16 on cpu: it was asked for",
    ]
    with pytest.raises(MixMoEError, match="one of auto, float32, bfloat16, float16, not 'half'"):
        choose_dtype("half", "cpu")
    with pytest.raises(MixMoEError, match="The device 'tpu0' cannot be used here"):
        choose_device("tpu0")


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_is_taken_before_the_cpu(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    monkeypatch.setattr(
        dtypes, "cpu_flags", lambda: frozenset({"avx512_bf16"}) - ({"avx512_bf16"} if has_it else set())
    )
    assert choose_device() == "cuda"
    assert choose_dtype("auto", "cuda").dtype == ("bfloat16" if has_it else "float32")


@pytest.mark.parametrize(
    ("dtype", "fastest", "note"),
    [
        ("float32", Choice("bfloat16", "why"), "training in float32; --bf16 would be faster: why"),
        ("float32", Choice("float32", "why"), "training in float32"),
        ("bfloat16", Choice("float32", "why"), "training in bfloat16"),
        ("bfloat16", Choice("bfloat16", "why"), "training in bfloat16"),
    ],
)
def test_what_a_training_run_says(dtype: str, fastest: Choice, note: str) -> None:
    assert training_note(dtype, fastest) == note
