#!/usr/bin/env python3
"""Write the asset card by which fairseq2 knows an exported Mix-MoE model and its tokenizer by name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main, write_text


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("export", metavar="EXPORT", help="exported model: a Hugging Face directory")
    parser.add_argument("--name", metavar="NAME", help="of the card (default: mixmoe_ and the directory's name)")
    parser.add_argument(
        "--output-dir", metavar="DIR", default=".",
        help="where NAME.yaml is written; fairseq2 reads the directories that FAIRSEQ2_USER_ASSET_DIR or a recipe's "
        "common.assets.extra_paths name (default: .)",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the card and print its path."""
    from mixmoe_megatron.integrations.fairseq2.cards import asset_card, card_text

    card = asset_card(args.export, args.name)
    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{card['name']}.yaml"
    write_text(path, card_text(card))
    print(path)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
