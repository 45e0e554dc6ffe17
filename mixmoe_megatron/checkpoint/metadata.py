"""`mixmoe_metadata.json`: what a checkpoint directory is, where it came from, and which phase may follow.

Every checkpoint directory carries one. Each step of the pipeline reads it and refuses a checkpoint of the wrong phase
with a sentence that says what to run. Standard library only, so that any tool may read it.

Version 2 names the method and the phase (see `methods`). Version 1 knew Mix-MoE and dense models alone: it named no
method, and a phase was its `stage`. It is still read.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from mixmoe_megatron.cli import whole_file
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import PHASES, method_of

METADATA_FILE = "mixmoe_metadata.json"
FORMAT_VERSION = 2
_VERSIONED_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "transformer-engine", "mixmoe-megatron")
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "phase": (Phase,), "options": (dict, NoneType), "megatron_args": (dict,), "hf_config": (dict,),
    "parent": (dict, NoneType), "versions": (dict,), "created_by": (str,), "data": (list,),
    "measured": (dict, NoneType),
}  # fmt: skip


@dataclass
class Metadata:
    """The contents of `mixmoe_metadata.json`.

    Attributes:
        phase: what the checkpoint is, written by its name beside its method's.
        options: as a dict, MixMoEOptions of a phase with experts, LoRAOptions of one with adapters, {"new_layers":
            [...]} of one with new layers; else None.
        megatron_args: Megatron argument name -> value, the dense architecture (see conversion/hf_config.py).
        hf_config: the base model's config.json.
        parent: {"path", "phase", "weights_xxh128"} of what this was made from; None if it was made from nothing.
        versions: package name -> version at the time of writing.
        created_by: the command that wrote it.
        data: what it was trained on so far, {"phase", "prefix", "kind", "tokens", "manifest_sha256", "order"} a file.
        measured: what upcycling cost on some text, {"tokens", "starts", "factor_without_ffn"}; None: not measured.
    """

    phase: Phase
    options: dict[str, Any] | None
    megatron_args: dict[str, Any]
    hf_config: dict[str, Any]
    parent: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created_by: str = ""
    data: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] | None = None

    def validate(self) -> None:
        """Check the fields' types, and the fields against each other.

        Raises:
            MixMoEError: a field of another type, or options in a dense checkpoint or missing in another.
        """
        for name, kinds in _FIELD_TYPES.items():
            if not isinstance(getattr(self, name), kinds):
                raise MixMoEError(f"{METADATA_FILE}: {name} is of the wrong type: {getattr(self, name)!r:.60}.")
        if self.parent is not None and not isinstance(self.parent.get("phase"), str):
            raise MixMoEError(f"{METADATA_FILE}: parent lacks phase.")
        if not all(isinstance(entry, dict) for entry in self.data):
            raise MixMoEError(f"{METADATA_FILE}: data must be a list of objects.")
        has_options = bool(self.phase.groups) or self.phase.has_new_layers or self.phase.has_adapters
        if (self.options is not None) != has_options:
            must = "must not have" if self.options is not None else "must have"
            raise MixMoEError(f"{METADATA_FILE} of phase {self.phase.name!r} {must} options.")
        if self.phase.has_new_layers:
            layers, last = (self.options or {}).get("new_layers"), self.megatron_args.get("num_layers")
            known = list(range(last)) if isinstance(last, int) else []
            if not isinstance(layers, list) or not layers or any(layer not in known for layer in layers):
                raise MixMoEError(
                    f"{METADATA_FILE}: options.new_layers must list layers of the {last} there are, not {layers!r}."
                )

        if self.phase.has_adapters:
            LoRAOptions.from_dict(self.options or {})

    @property
    def lora(self) -> LoRAOptions | None:
        """LoRA's options, where the model has adapters."""
        return LoRAOptions.from_dict(self.options or {}) if self.phase.has_adapters else None

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The 0-based numbers of the layers that the base has not."""
        return tuple(self.options["new_layers"]) if self.phase.has_new_layers and self.options else ()

    def to_json(self) -> str:
        """Return the file's contents; package versions are filled in when empty.

        Raises:
            MixMoEError: the metadata is inconsistent.
        """
        self.validate()
        self.versions = self.versions or package_versions()
        method = method_of(self.phase).name
        fields = {"format_version": FORMAT_VERSION, "method": method, **asdict(self), "phase": self.phase.name}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def package_versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python, of the packages that shape a checkpoint and of others, where installed."""
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for name in (*_VERSIONED_PACKAGES, *others):
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
    fields = raw if isinstance(raw, dict) else {}
    version = fields.pop("format_version", 1)
    if version not in (1, FORMAT_VERSION):
        raise MixMoEError(f"{path} has format_version {version!r}, this package reads 1 and {FORMAT_VERSION}.")
    if version == 1:
        fields = _from_version_1(fields)
    required = {"phase", "options", "megatron_args", "hf_config"}
    if missing := sorted(required - set(fields)):
        raise MixMoEError(f"{path} lacks {', '.join(missing)}.")
    phase = PHASES.get(str(fields["phase"]))
    if phase is None:
        raise MixMoEError(f"{path} has phase {fields['phase']!r}, expected one of {', '.join(PHASES)}.")
    method = method_of(phase).name
    if (found := fields.pop("method", method)) != method:
        raise MixMoEError(f"{path} has phase {phase.name!r} of method {found!r}, but it is one of {method!r}.")
    if unknown := sorted(set(fields) - set(_FIELD_TYPES)):
        raise MixMoEError(f"{path} has unknown fields: {', '.join(unknown)}.")
    metadata = Metadata(**{**fields, "phase": phase})
    metadata.validate()
    return metadata


def _from_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `stage` renamed to `phase`: their own, the parent's and those of the entries of data.

    An option that did not exist is given the value that stands for what was done then.
    """

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        return {"phase" if k == "stage" else k: v for k, v in value.items()} if isinstance(value, dict) else value

    if isinstance(fields.get("options"), dict):
        fields["options"] = {"router_init_std": None, **fields["options"]}
    return renamed(fields) | {name: renamed(fields[name]) for name in ("parent", "data") if name in fields}


def require_phase(metadata: Metadata, wanted: str | tuple[str, ...], what_to_run: str | None = None) -> None:
    """Refuse a checkpoint of the wrong phase.

    Args:
        metadata: of the checkpoint that was given.
        wanted: the name, or names, of the phases that the step accepts.
        what_to_run: the command that makes a wanted one, for the message; default: as the first of them tells.

    Raises:
        MixMoEError: metadata.phase is not among the wanted ones.
    """
    names = (wanted,) if isinstance(wanted, str) else wanted
    if metadata.phase.name not in names:
        needed = " or ".join(map(repr, names))
        what_to_run = what_to_run or PHASES[names[0]].made_by
        raise MixMoEError(
            f"the checkpoint is of stage {metadata.phase.name!r}, but this step needs {needed}: {what_to_run}"
        )
