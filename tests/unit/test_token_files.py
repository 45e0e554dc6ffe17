"""Token files are, byte for byte, what Megatron's own builder writes, and writing them loads neither it nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from mixmoe_megatron.data.storage import TokenFileWriter, read_manifest
from tests.helpers.tiny_tokenizers import make_tokenizer

DOCUMENTS = [([[5, 6, 7], [1]], 1), ([[]], 0), ([[4, 499]], -3)]


@pytest.mark.parametrize("with_modes", [False, True])
@pytest.mark.parametrize("vocab_size", [500, 65_499, 65_500, 200_000])
@pytest.mark.parametrize("documents", [DOCUMENTS, []])
def test_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, documents: list[tuple[list[list[int]], int]], vocab_size: int, with_modes: bool
) -> None:
    dtype = DType.optimal_dtype(vocab_size)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype, multimodal=with_modes)
    with TokenFileWriter(tmp_path / "ours", vocab_size, with_modes=with_modes) as ours:
        for sequences, mode in documents:
            lengths = [len(sequence) for sequence in sequences]
            theirs.add_document(np.array(list(chain(*sequences)), dtype), lengths, [mode] * len(lengths))
            ours.add(sequences, mode)
        manifest = ours.commit({"kind": "monolingual"})
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    tokens = sum(len(sequence) for sequences, _ in documents for sequence in sequences)
    assert (manifest["documents"], manifest["tokens"]) == (len(documents), tokens)
    assert not documents or read_manifest(tmp_path / "ours", "monolingual") == manifest


def test_the_command_loads_neither_megatron_nor_torch(tmp_path: Path, repo_root: Path) -> None:
    """They take longer to import than a small corpus takes to tokenize. Transformers 4 is known to do without torch."""
    heavy = {"megatron", "datasets"} | ({"torch"} if version("transformers").startswith("4.") else set())
    (tmp_path / "text").write_text("The river runs through the town and the children play.\n")
    tool = str(repo_root / "tools" / "preprocess_data.py")
    words = ["mono", "--input", str(tmp_path / "text"), "--tokenizer", str(make_tokenizer("bpe", tmp_path))]
    code = (
        "import json, runpy, sys; sys.argv = json.loads(sys.argv[1])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, *sys.modules)\n"
    )
    command = [tool, *words, "--output-prefix", str(tmp_path / "mono")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(command)], cwd=repo_root, env={"PYTHONPATH": str(repo_root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    status, *modules = done.stdout.split()
    assert status == "0" and heavy.isdisjoint(modules)
    assert "PyTorch" not in done.stderr
    assert read_manifest(tmp_path / "mono", "monolingual")["documents"] == 1
