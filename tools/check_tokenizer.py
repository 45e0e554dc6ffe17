#!/usr/bin/env python3
"""Say whether a tokenizer suits translation training: special tokens; bytes a token and unknown tokens by language."""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.cli import make_main
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer directory")
    parser.add_argument(
        "--mono", nargs="+", default=[], metavar="XX=FILE", help="a language's plain text, compressed or not"
    )
    parser.add_argument(
        "--max-lines", type=int, default=10_000, metavar="N", help="lines of each text (default: 10000)"
    )
    parser.add_argument("--prompt-template", metavar="FILE", help="default: ALMA's wording")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check and print."""
    from mixmoe_megatron.data.prompts import load_template
    from mixmoe_megatron.data.tokenizer_check import describe_check, language_figures
    from mixmoe_megatron.data.tokenizers import leave_torch_out, open_tokenizer

    leave_torch_out()
    if args.max_lines < 1:
        raise MixMoEError(f"--max-lines must be 1 or more, not {args.max_lines}.")
    template, tokenizer = load_template(args.prompt_template), open_tokenizer(args.tokenizer)
    figures = {}
    for word in args.mono:
        language, equals, path = word.partition("=")
        if not equals or language in figures:
            raise MixMoEError(f"--mono takes one LANGUAGE=FILE for each language, such as de=news.txt; got {word}.")
        figures[language] = language_figures(tokenizer, language, path, args.max_lines, template)
    print(describe_check(tokenizer, figures))


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
