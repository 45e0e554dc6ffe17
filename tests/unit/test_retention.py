"""--eval-mono: how files are read and refused, and that they are cheap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixmoe_megatron.data.tokenizers import count_ids
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.retention import HELD_OUT_BYTES, RetentionCurve
from tests.helpers.tiny_hf import save_tiny_dense


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_tiny_dense(directory, "qwen2")
    return directory


def curve(base: Path, *files: Path, **changes: Any) -> RetentionCurve:
    values = {"eval_mono": list(map(str, files)), "eval_mono_interval": None, "eval_interval": 5, "skip_train": False}
    values |= {"tokenizer_model": str(base), "vocab_size": count_ids(base), "seq_length": 32}
    return RetentionCurve(SimpleNamespace(**{**values, **changes}))  # type: ignore[arg-type]


def test_the_first_bytes_of_each_file_are_read_and_each_token_predicted_once(base: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.de.txt", tmp_path / "large.txt"
    small.write_text("Ein Satz.\n\nNoch einer, über Äpfel.\n", "utf-8")
    large.write_text("é" * 100 + "\n" + "x é " * HELD_OUT_BYTES, "utf-8")
    made = curve(base, small, large)
    assert made.interval == 5 and curve(base, small, eval_mono_interval=2).interval == 2
    assert list(made.files) == ["small_de", "large"]
    few, many = made.files.values()
    assert few.num_bytes == len("Ein Satz.Noch einer, über Äpfel.".encode())
    ids = made.tokenizer.encode(["Ein Satz.", "Noch einer, über Äpfel."], add_special_tokens=False)
    assert sum(len(sequence) - 1 for sequence in few.sequences) == sum(map(len, ids))
    assert HELD_OUT_BYTES - 1 <= many.num_bytes <= HELD_OUT_BYTES
    assert max(map(len, many.sequences)) == 33, "a context and --seq-length tokens"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "Cannot read .*a.txt: No such file"), (b"", "holds no text"), (b" \n\n", "holds no text"),
     (b"fine\n\xff\xfe\n", "a.txt, line 2: not UTF-8"), (b"PK\x03\x04" + b"\0" * 40, "a.txt is ")],
)  # fmt: skip
def test_files_that_cannot_serve(base: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MixMoEError, match=message):
        curve(base, tmp_path / "a.txt")


def test_other_refusals(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n", "utf-8")
    with pytest.raises(MixMoEError, match="two files are called a: give them different names"):
        curve(base, tmp_path / "a.txt", tmp_path / "a.txt")
    for changes in ({"eval_mono_interval": 0}, {"eval_interval": None}):
        with pytest.raises(MixMoEError, match="must be 1 or more"):
            curve(base, tmp_path / "a.txt", **changes)
    with pytest.raises(MixMoEError, match="leave --skip-train out"):
        curve(base, tmp_path / "a.txt", skip_train=True)
