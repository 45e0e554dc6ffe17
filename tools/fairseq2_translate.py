#!/usr/bin/env python3
"""Translate a file, a text a line, with a Mix-MoE model that fairseq2 knows by its card; needs fairseq2."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main, write_text
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model's card, or checkpoint_step_N")
    parser.add_argument("--tokenizer", metavar="NAME", help="name of the tokenizer's card (default: the model's)")
    parser.add_argument(
        "--cards", nargs="+", default=[], type=Path, metavar="PATH",
        help="cards, or directories of them, beside those that fairseq2 finds by itself",
    )  # fmt: skip
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="of a recipe's run: OUTPUT_DIR/checkpoints")
    parser.add_argument("--input", required=True, metavar="FILE", help="text, compressed or not")
    parser.add_argument("--output", required=True, metavar="FILE", help="a translation a line")
    parser.add_argument("--source-language", required=True, metavar="XX", help="its code, such as de")
    parser.add_argument("--target-language", required=True, metavar="XX", help="its code, such as en")
    parser.add_argument("--prompt-template", metavar="FILE", help="default: ALMA's wording")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="1: greedy (default); more: beam search")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of a translation (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="at most (default: 16)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Translate."""
    if importlib.util.find_spec("fairseq2") is None:
        raise MixMoEError("fairseq2 is not installed: `make test-fairseq2` makes .venv-fairseq2, which has it.")
    from mixmoe_megatron.data.corpus import read_lines
    from mixmoe_megatron.data.prompts import load_template
    from mixmoe_megatron.integrations.fairseq2.translation import DecodingOptions, load_by_name, translate_sources

    options = DecodingOptions(args.beams, args.max_new_tokens, args.batch_size)
    template, languages = load_template(args.prompt_template), (args.source_language, args.target_language)
    sources = [line for _, line in read_lines(args.input)]
    model, tokenizer = load_by_name(args.model, args.tokenizer or args.model, args.cards, args.checkpoint_dir)
    translations = translate_sources(model, tokenizer, sources, languages, options, template)
    write_text(args.output, "".join(f"{line}\n" for line in translations))


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
