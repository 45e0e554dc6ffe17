"""Asset cards: how fairseq2 knows a model and its tokenizer by name. Nothing here needs fairseq2."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mixmoe_megatron.checkpoint.hf_files import side_files
from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.data.tokenizers import TOKENIZER_FILES
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.integrations.fairseq2.architecture import FAMILY, MixMoEModelConfig

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def asset_card(export: str | Path, name: str | None = None) -> dict[str, Any]:
    """Return the card of an exported model, and of its tokenizer if one lies beside.

    Args:
        export: directory that `mixmoe_to_hf.py`, or fairseq2, exported.
        name: of the card; None: `mixmoe_` and the directory's name, since fairseq2 has cards of many names itself.

    Raises:
        MixMoEError: the directory holds no Mix-MoE model that fairseq2 can run, or the name is none for a card.
    """
    directory = Path(export).resolve()
    config = read_hf_config(directory)
    if config.get("model_type") != FAMILY:
        raise MixMoEError(
            f"{export} is a model of type {config.get('model_type')!r}, not mixmoe: fairseq2 has families of its own "
            "for dense models."
        )
    if not any(directory.glob("*.safetensors")):
        raise MixMoEError(f"{export} holds no weights (*.safetensors).")
    card_name = f"{FAMILY}_{directory.name}" if name is None else name
    if not _NAME.fullmatch(card_name):
        raise MixMoEError(f"A card's name is of letters, digits, dots, dashes and underscores, not {card_name!r}.")
    known = {path.name for path in side_files(directory)}
    has_tokenizer = bool(known & set(TOKENIZER_FILES))
    card: dict[str, Any] = {
        "name": card_name,
        "model_family": FAMILY,
        "model_config": asdict(MixMoEModelConfig.from_hf(config, side_files=str(directory))),
        "checkpoint": directory.as_uri(),
    }
    if has_tokenizer:
        card |= {"tokenizer_family": FAMILY, "tokenizer": directory.as_uri()}
    return card


def card_text(card: dict[str, Any]) -> str:
    """Return a card as the YAML that fairseq2 reads."""
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
