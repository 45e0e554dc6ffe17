"""Exported models that fairseq2 knows by name, for the tests in tests/fairseq2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_text
from mixmoe_megatron.hf import MixMoEForCausalLM
from mixmoe_megatron.integrations.fairseq2.cards import asset_card, card_text
from tests.helpers.tiny_hf import tiny_mixmoe, tiny_tokenizer

REASON = "needs fairseq2: `make test-fairseq2` installs it"
SETTINGS = {"FAIRSEQ2_EXTENSION_TRACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def add_card(export: Path, cards: Path, name: str | None = None) -> None:
    """Write the card of an export into a directory of cards."""
    card = asset_card(export, name)
    cards.mkdir(parents=True, exist_ok=True)
    write_text(cards / f"{card['name']}.yaml", card_text(card))


def export_tiny(
    directory: Path, name: str, family: str = "llama", stage: int = 2, tokenizer: str = "sentencepiece", **fields: Any
) -> MixMoEForCausalLM:
    """Save a random model as DIRECTORY/NAME with a tokenizer and a card in DIRECTORY/cards, and return it."""
    model = tiny_mixmoe(family, stage, **fields)
    model.save_pretrained(directory / name)
    tiny_tokenizer(directory / name, tokenizer)
    add_card(directory / name, directory / "cards")
    return model


def run_python(words: list[Any], cards: Path | None = None, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run Python on words that follow it, by torchrun for several processes; fairseq2 knows the cards."""
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    root = Path(__file__).resolve().parents[2]
    settings = {**os.environ, **SETTINGS, "PYTHONPATH": str(root)}
    settings.pop("FAIRSEQ2_USER_ASSET_DIR", None)
    if cards is not None:
        settings["FAIRSEQ2_USER_ASSET_DIR"] = str(cards)
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)], cwd=root, env=settings, capture_output=True, text=True
    )
