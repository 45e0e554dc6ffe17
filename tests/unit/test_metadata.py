"""mixmoe_metadata.json: round trip, refusals, and the hash of the parent's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint.metadata import (
    METADATA_FILE,
    Metadata,
    read_metadata,
    require_phase,
    write_metadata,
)
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import PHASES


def make_metadata(**fields) -> Metadata:
    return Metadata(
        **{
            "phase": PHASES["stage1"],
            "options": {"a": 1},
            "megatron_args": {"num_layers": 4},
            "hf_config": {},
            **fields,
        }
    )


def test_round_trip(tmp_path: Path) -> None:
    written = make_metadata(parent={"path": "base", "phase": "dense", "weights_xxh128": "0" * 64}, created_by="test")
    write_metadata(tmp_path, written)
    assert read_metadata(tmp_path) == written
    assert written.versions["torch"] and [p.name for p in tmp_path.iterdir()] == [METADATA_FILE]
    content = json.loads((tmp_path / METADATA_FILE).read_text())
    assert [content[name] for name in ("format_version", "method", "phase")] == [2, "mixmoe", "stage1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phase": "stage1"}, "phase is of the wrong type"),
        ({"options": None}, "must have options"),
        ({"phase": PHASES["dense"]}, "must not have options"),
    ],
)
def test_inconsistent_metadata_is_not_written(tmp_path: Path, fields, message) -> None:
    with pytest.raises(MixMoEError, match=message):
        write_metadata(tmp_path, make_metadata(**fields))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "lacks"),
        ('{"stage": "dense"}', "lacks hf_config, megatron_args, options"),
        (
            '{"stage": "dense", "options": null, "megatron_args": {}, "hf_config": {}, "extra": 1}',
            "unknown fields: extra",
        ),
        ('{"format_version": 3, "stage": "dense"}', "format_version 3, this package reads 1 and 2"),
        (
            '{"stage": "stage3", "options": {}, "megatron_args": {}, "hf_config": {}}',
            "has phase 'stage3', expected one",
        ),
        (
            '{"format_version": 2, "method": "full", "phase": "stage1", "options": {}, "megatron_args": {}, '
            '"hf_config": {}}',
            "has phase 'stage1' of method 'full', but it is one of 'mixmoe'",
        ),
        (
            '{"format_version": 2, "stage": "stage1", "options": {}, "megatron_args": {}, "hf_config": {}}',
            "lacks phase",
        ),
    ],
)
def test_broken_file(tmp_path: Path, text, message) -> None:
    (tmp_path / METADATA_FILE).write_text(text)
    with pytest.raises(MixMoEError, match=message):
        read_metadata(tmp_path)


def test_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match=r"hf_to_mixmoe\.py"):
        read_metadata(tmp_path)


def test_wrong_phase_says_what_to_run() -> None:
    require_phase(make_metadata(), ("upcycled", "stage1"), "unused")
    with pytest.raises(MixMoEError, match=r"'stage1'.*needs 'stage2': run stage 2 first"):
        require_phase(make_metadata(), "stage2", "run stage 2 first")
    with pytest.raises(MixMoEError, match=r"needs 'upcycled' or 'dense': upcycle a dense model with"):
        require_phase(make_metadata(), ("upcycled", "dense"))
