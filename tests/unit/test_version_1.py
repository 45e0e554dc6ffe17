"""What the first version of mixmoe_metadata.json left behind goes on being read, converted and trained.

`version_1/` holds files that it wrote: the metadata of a checkpoint of each phase, and config.json of its export. The
quickstart's base is a dense export of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, read_metadata, write_metadata
from mixmoe_megatron.conversion.hf_import import ImportRequest, read_hf_model
from mixmoe_megatron.hf import MixMoEConfig
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.training.arguments import parse_arguments
from tests.helpers.conversion import run_conversion
from tests.helpers.tiny_hf import save_tiny_dense, tiny_mixmoe

FILES = Path(__file__).parent / "version_1"
BASE = Path(__file__).resolve().parents[2] / "examples/quickstart/base"
EXPERTS = ["upcycled", "stage1", "stage2"]


@pytest.mark.parametrize(
    ("directory", "method", "phase", "parent", "data"),
    [
        (BASE, "full", "dense", "dense", []),
        (FILES / "upcycled", "mixmoe", "upcycled", "dense", []),
        (FILES / "stage1", "mixmoe", "stage1", "upcycled", ["stage1"]),
        (FILES / "stage2", "mixmoe", "stage2", "stage1", ["stage1", "stage2"]),
    ],
    ids=["dense", *EXPERTS],
)
def test_metadata_is_read_and_written_anew(
    tmp_path: Path, directory: Path, method: str, phase: str, parent: str, data: list[str]
) -> None:
    raw = json.loads((directory / METADATA_FILE).read_text())
    assert raw["format_version"] == 1 and raw["stage"] == phase
    metadata = read_metadata(directory)
    assert metadata.phase.name == phase and metadata.parent is not None and metadata.parent["phase"] == parent
    assert [entry["phase"] for entry in metadata.data] == data
    assert metadata.megatron_args == raw["megatron_args"] and metadata.versions == raw["versions"]
    write_metadata(tmp_path, metadata)
    anew = (tmp_path / METADATA_FILE).read_text()
    assert '"stage"' not in anew and json.loads(anew)["method"] == method
    assert read_metadata(tmp_path) == metadata


def checkpoint_of(phase: str, directory: Path) -> Path:
    """A directory with the metadata of version 1 and what marks a complete checkpoint, without weights."""
    shutil.copytree(FILES / phase, directory / phase)
    (directory / phase / "latest_checkpointed_iteration.txt").write_text("release")
    return directory / phase


def test_training_starts_from_it_and_goes_on(tmp_path: Path) -> None:
    upcycled, stage1, stage2 = (checkpoint_of(phase, tmp_path) for phase in EXPERTS)
    for stage, flag, directory, experts in (
        (1, "--init-from", upcycled, 4), (1, "--load", stage1, 4),
        (2, "--init-from", stage1, 8), (2, "--load", stage2, 8),
    ):  # fmt: skip
        args, _ = parse_arguments(["--mixmoe-stage", str(stage), flag, str(directory)])
        assert args.num_experts == experts and args.renormalize_topk is False, "an option younger than the file"


def test_a_checkpoint_is_exported_as_it_was(tmp_path: Path) -> None:
    """And the export, with config.json and metadata of version 1, comes back."""
    checkpoint, export = tmp_path / "checkpoint", tmp_path / "export"
    save_tiny_dense(tmp_path / "base", "qwen2", tokenizer=None)
    words = ["--hf-dir", tmp_path / "base", "--output-dir", checkpoint, "--moe-every=2"]
    assert run_conversion("hf_to_mixmoe", *words) == 0
    shutil.copy(FILES / "upcycled" / METADATA_FILE, checkpoint)
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", export) == 0
    # Version 1 wrote fields at their defaults too, so what transformers makes of both files is compared.
    found, expected = (MixMoEConfig.from_pretrained(folder).to_dict() for folder in (export, FILES / "hf_upcycled"))
    del found["transformers_version"], expected["transformers_version"]
    expected["mixmoe"] |= {"router_init_std": None, "renormalize_topk": False}  # options since
    expected["mixmoe"] |= {"base_expert": False, "shared_experts": 0}
    assert found == expected
    raw = json.loads((FILES / "hf_upcycled" / "config.json").read_text())
    raw["mixmoe"], raw["renormalize_topk"] = expected["mixmoe"], False
    assert json.loads((export / "config.json").read_text()).items() <= raw.items()
    assert json.loads((export / METADATA_FILE).read_text())["format_version"] == 1
    assert run_conversion("hf_to_mixmoe", "--hf-dir", export, "--output-dir", tmp_path / "back") == 0
    assert read_metadata(tmp_path / "back").phase.name == "upcycled"


@pytest.mark.parametrize("stage", [1, 2])
def test_an_export_is_read(tmp_path: Path, stage: int) -> None:
    tiny_mixmoe("qwen2", stage).save_pretrained(tmp_path)
    shutil.copy(FILES / f"hf_stage{stage}" / "config.json", tmp_path)
    shutil.copy(FILES / f"stage{stage}" / METADATA_FILE, tmp_path)
    metadata = read_hf_model(ImportRequest(str(tmp_path), output_dir="")).metadata
    shipped = read_metadata(FILES / f"stage{stage}")
    options = MixMoEOptions.from_dict(shipped.options).to_dict()  # some are younger than the file
    assert (metadata.phase, metadata.options, metadata.data) == (shipped.phase, options, shipped.data)
