"""The files of a Hugging Face directory that are not weights: tokenizer, generation settings, licence, model card."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.metadata import Metadata
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.markup import escape_markdown

TOKENIZER_DIR = "tokenizer"
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# How a path begins: a slash, ./ or ../, ~, a Windows drive, file:.
_PATH = re.compile(r"[/~]|\.{1,2}(/|$)|[A-Za-z]:\S|file:", re.IGNORECASE)


def own_file(directory: str | Path, name: str) -> Path:
    """Return the path of a file of a model directory.

    Args:
        directory: of the model.
        name: from an index or a listing, and not to be trusted.

    Raises:
        MixMoEError: the name leads out of the directory, the file is missing, or it is a link to a file outside. The
            links of a Hugging Face cache, from snapshots/ to blobs/, are its own.
    """
    root = Path(directory).resolve()
    if Path(name).name != name:
        raise MixMoEError(f"{directory}: {name!r} is named, which is not a file of this directory.")
    path = root / name
    if not os.path.isfile(path):  # False for a name that no file can have, too
        if os.path.islink(path):
            raise MixMoEError(
                f"{directory}: {name} is a link to {os.readlink(path)}, which is missing: put the file itself in its "
                "place, or download the model again."
            )
        raise MixMoEError(f"{directory}: {name} is named, which is missing.")
    caches = [place.parent / "blobs" for place in root.parents if place.name == "snapshots"]
    if not any(path.resolve().is_relative_to(place.resolve()) for place in [root, *caches]):
        raise MixMoEError(
            f"{directory}: {name} is a link to a file outside of this directory, which is not followed; "
            f"`cp -rL {directory} COPY` makes a directory that holds the files themselves."
        )
    return path


def side_files(directory: str | Path) -> list[Path]:
    """Return the tokenizer, generation settings, chat template and licence files of a directory.

    Raises:
        MixMoEError: one is a link to a file outside, or to none.
    """
    found = {path for pattern in _CARRIED for path in Path(directory).glob(pattern)}
    return [own_file(directory, path.name) for path in sorted(found) if path.is_file() or path.is_symlink()]


def copy_side_files(source: str | Path, destination: str | Path) -> list[str]:
    """Copy the `side_files` of a directory.

    Args:
        source: a Hugging Face directory, or the `tokenizer` directory of a checkpoint.
        destination: made if missing.

    Returns:
        The names of the files copied.

    Raises:
        MixMoEError: see `side_files`.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    found = side_files(source)
    for path in found:
        shutil.copyfile(path, destination / path.name)
    return [path.name for path in found]


def published_name(name: Any) -> str | None:
    """Return a base model's name as a card may give it; None if it is none, or a path of this machine."""
    name = " ".join(name.split()) if isinstance(name, str) else ""
    is_path = _PATH.match(name) or name.count("/") > 1 or "\\" in name or os.path.exists(name)
    return None if is_path or not name else name


def model_card(metadata: Metadata, base_model: str | None, num_parameters: int) -> str:
    """Return the README.md of an exported model.

    Args:
        metadata: of the exported checkpoint.
        base_model: name of the dense model it all came from, if known.
        num_parameters: of the exported model.
    """
    import yaml  # which few conversions need

    dense = not metadata.phase.groups
    header = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header |= {} if base_model is None else {"base_model": base_model}
    tags = ["translation", *([] if dense else ["mixmoe", "mixture-of-experts"])]
    front_matter = yaml.safe_dump({**header, "tags": tags}, sort_keys=False, allow_unicode=True)
    title = "Dense model" if dense else f"Mix-MoE, {metadata.phase.name}"
    lines = [f"---\n{front_matter}---", "", f"# {escape_markdown(title)}", "", "| | |", "|---|---|"]
    rows: dict[str, Any] = {"base model": base_model or "not recorded", "phase": metadata.phase.name}
    rows |= {"parameters": num_parameters, **(metadata.options or {})}
    if metadata.parent:
        hashes = {k.removeprefix("weights_"): v for k, v in metadata.parent.items() if k.startswith("weights_")}
        rows["made from"] = ", ".join([metadata.parent["phase"], *(f"weights {k} {v}" for k, v in hashes.items())])
    rows["made by"] = ", ".join([metadata.created_by, *(f"{k} {v}" for k, v in metadata.versions.items())])
    lines += [f"| {escape_markdown(str(name))} | {escape_markdown(str(value))} |" for name, value in rows.items()]
    if metadata.data:
        lines += ["", "## Training data", "", "| phase | files | kind | tokens | sha256 of the manifest |"]
        lines += ["|---|---|---|---:|---|"]
        names = ("phase", "prefix", "kind", "tokens", "manifest_sha256")
        cells = [[escape_markdown(str(entry.get(name, ""))) for name in names] for entry in metadata.data]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    if not dense:
        lines += [
            "",
            "Mix-MoE: arXiv:2605.24681. Load with `trust_remote_code=True`; the modeling code is in this directory.",
            "The tokenizer alone needs no trust: `AutoTokenizer.from_pretrained(..., trust_remote_code=False)`.",
        ]
    lines += [
        "",
        "## Licence",
        "",
        "These weights are derived from the base model: its licence applies to them. Check it, and the licences of the",
        "training data, before you publish or use them.",
        "",
    ]
    return "\n".join(lines)
