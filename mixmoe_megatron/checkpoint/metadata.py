"""`mixmoe_metadata.json`: what a checkpoint directory is, where it came from, and which stage may follow.

Every checkpoint directory carries one. Each step of the pipeline reads it and refuses a checkpoint of the wrong stage
with a sentence that says what to run. Standard library only, so that any tool may read it.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from mixmoe_megatron.cli import whole_file
from mixmoe_megatron.errors import MixMoEError

METADATA_FILE = "mixmoe_metadata.json"
FORMAT_VERSION = 1
STAGES = ("dense", "upcycled", "stage1", "stage2")
_VERSIONED_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "transformer-engine", "mixmoe-megatron")


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "stage": (str,), "options": (dict, NoneType), "megatron_args": (dict,), "hf_config": (dict,),
    "parent": (dict, NoneType), "versions": (dict,), "created_by": (str,), "data": (list,),
}  # fmt: skip


@dataclass
class Metadata:
    """The contents of `mixmoe_metadata.json`.

    Attributes:
        stage: one of `STAGES`.
        options: MixMoEOptions as a dict; None for a dense checkpoint.
        megatron_args: Megatron argument name -> value, the dense architecture (see conversion/hf_config.py).
        hf_config: the base model's config.json.
        parent: {"path", "stage", "weights_xxh128"} of what this was made from; None if it was made from nothing.
        versions: package name -> version at the time of writing.
        created_by: the command that wrote it.
        data: what it was trained on so far, {"stage", "prefix", "kind", "tokens", "manifest_sha256", "order"} a file.
        format_version: of this file.
    """

    stage: str
    options: dict[str, Any] | None
    megatron_args: dict[str, Any]
    hf_config: dict[str, Any]
    parent: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created_by: str = ""
    data: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def validate(self) -> None:
        """Check the fields' types, and the fields against each other.

        Raises:
            MixMoEError: a field of another type, unknown stage or version, or options missing for a Mix-MoE stage.
        """
        for name, kinds in _FIELD_TYPES.items():
            if not isinstance(getattr(self, name), kinds):
                raise MixMoEError(f"{METADATA_FILE}: {name} is of the wrong type: {getattr(self, name)!r:.60}.")
        if self.parent is not None and not isinstance(self.parent.get("stage"), str):
            raise MixMoEError(f"{METADATA_FILE}: parent lacks stage.")
        if not all(isinstance(entry, dict) for entry in self.data):
            raise MixMoEError(f"{METADATA_FILE}: data must be a list of objects.")
        if self.format_version != FORMAT_VERSION:
            raise MixMoEError(
                f"{METADATA_FILE} has format_version {self.format_version!r}, this package reads {FORMAT_VERSION}."
            )
        if self.stage not in STAGES:
            raise MixMoEError(f"{METADATA_FILE} has stage {self.stage!r}, expected one of {', '.join(STAGES)}.")
        if (self.options is None) != (self.stage == "dense"):
            raise MixMoEError(
                f"{METADATA_FILE} of stage {self.stage!r} must {'not ' * (self.stage == 'dense')}have options."
            )

    def to_json(self) -> str:
        """Return the file's contents; package versions are filled in when empty.

        Raises:
            MixMoEError: the metadata is inconsistent.
        """
        self.validate()
        self.versions = self.versions or package_versions()
        return json.dumps({"format_version": self.format_version, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a checkpoint; absent packages are left out."""
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for name in _VERSIONED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_metadata(directory: str | Path, metadata: Metadata) -> Path:
    """Write `mixmoe_metadata.json` atomically. Raises as `Metadata.to_json`."""
    path = Path(directory) / METADATA_FILE
    with whole_file(path) as stream:
        stream.write(metadata.to_json())
    return path


def read_metadata(directory: str | Path) -> Metadata:
    """Read `mixmoe_metadata.json` of a checkpoint directory.

    Raises:
        MixMoEError: the file is missing, is not JSON, lacks a field, or is inconsistent.
    """
    path = Path(directory) / METADATA_FILE
    if not path.is_file():
        raise MixMoEError(
            f"{directory} has no {METADATA_FILE}: it is not a checkpoint of this project (run hf_to_mixmoe.py)."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MixMoEError(f"{path} is not valid JSON ({error}).") from None
    names = set(Metadata.__dataclass_fields__)
    required = {"stage", "options", "megatron_args", "hf_config"}
    if not isinstance(raw, dict) or not required <= set(raw):
        missing = sorted(required - set(raw if isinstance(raw, dict) else {}))
        raise MixMoEError(f"{path} lacks {', '.join(missing)}.")
    if unknown := sorted(set(raw) - names):
        raise MixMoEError(f"{path} has unknown fields: {', '.join(unknown)}.")
    metadata = Metadata(**raw)
    metadata.validate()
    return metadata


def require_stage(metadata: Metadata, wanted: str | tuple[str, ...], what_to_run: str) -> None:
    """Refuse a checkpoint of the wrong stage.

    Args:
        metadata: of the checkpoint that was given.
        wanted: the stage, or stages, that the step accepts.
        what_to_run: the command that makes the wanted stage, for the message.

    Raises:
        MixMoEError: metadata.stage is not among the wanted ones.
    """
    stages = (wanted,) if isinstance(wanted, str) else wanted
    if metadata.stage not in stages:
        needed = " or ".join(map(repr, stages))
        raise MixMoEError(f"the checkpoint is of stage {metadata.stage!r}, but this step needs {needed}: {what_to_run}")
