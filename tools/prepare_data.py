#!/usr/bin/env python3
"""Prepare corpora: clean, filter, deduplicate, keep test text out of training, sample; see the protocol's module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from mixmoe_megatron.cli import make_main
from mixmoe_megatron.data.preparation.filters import FilterOptions
from mixmoe_megatron.data.preparation.prepare import prepare
from mixmoe_megatron.data.preparation.protocol import Protocol, load_protocol
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="gets the files and manifest.json")
    parser.add_argument("--protocol", metavar="FILE", help='YAML file, or "paper" for the paper\'s protocol')
    parser.add_argument(
        "--parallel", action="append", default=[], metavar="PAIR.SPLIT=FILE", help="cs-en.train=F.tsv.gz; repeatable"
    )
    parser.add_argument(
        "--mono", action="append", default=[], metavar="LANG.SPLIT=FILE", help="cs.train=F.txt.gz; repeatable"
    )
    parser.add_argument("--flores", metavar="DIR", help="FLORES-200: adds its devtest as test set `flores`")
    parser.add_argument("--languages", metavar="A,B", help="only these of the protocol, and English")
    parser.add_argument("--pairs-per-language", type=int, metavar="N", help="training pairs to choose; 0: all")
    parser.add_argument("--lines-per-language", type=int, metavar="N", help="monolingual lines to choose; 0: all")
    parser.add_argument("--seed", type=int, help="of the choice")
    parser.add_argument("--min-words", type=int, metavar="N", help="least words a side (zh, ja: characters)")
    parser.add_argument("--max-words", type=int, metavar="N", help="most words a side")
    parser.add_argument("--max-characters", type=int, metavar="N", help="most characters a side")
    parser.add_argument("--max-length-ratio", type=float, metavar="R", help="longer side / shorter side; 0: no limit")
    parser.add_argument("--drop-copies", action="store_true", default=None, help="drop pairs of two equal sides")
    parser.add_argument("--language-id", action="store_true", default=None, help="drop lines in another language")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that filter")
    return parser


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Join the protocol file and the flags; a flag wins.

    Raises:
        MixMoEError: They describe no valid protocol.
    """
    parallel, monolingual = _splits(args.parallel, "--parallel"), _splits(args.mono, "--mono")
    if args.protocol:
        protocol = load_protocol(args.protocol)
        protocol = replace(
            protocol,
            parallel={**protocol.parallel, **parallel},
            monolingual={**protocol.monolingual, **monolingual},
        )
    else:
        protocol = Protocol(parallel=parallel, monolingual=monolingual)
    if args.languages:
        protocol = protocol.only(args.languages.split(","))
    if args.flores:
        test = Source(flores=args.flores, split="devtest")
        pairs = {pair: {**splits, "flores": test} for pair, splits in protocol.parallel.items()}
        protocol = replace(protocol, parallel=pairs)
    numbers = ("seed", "pairs_per_language", "lines_per_language")
    values = {name: getattr(args, name) for name in numbers if getattr(args, name) is not None}
    filters = {name: getattr(args, name) for name in FilterOptions.__dataclass_fields__}
    filters = {name: value for name, value in filters.items() if value is not None}
    return replace(protocol, **values, filters=replace(protocol.filters, **filters))


def _splits(values: Sequence[str], option: str) -> dict[str, dict[str, Source]]:
    """NAME.SPLIT=FILE words; several files of one split are read one after the other."""
    files: dict[str, dict[str, tuple[str, ...]]] = {}
    for value in values:
        place, _, path = value.partition("=")
        name, _, split = place.partition(".")
        if not (name and split and path):
            raise MixMoEError(f"{option} takes NAME.SPLIT=FILE, not {value!r}.")
        splits = files.setdefault(name, {})
        splits[split] = (*splits.get(split, ()), path)
    return {name: {split: Source(files=paths) for split, paths in splits.items()} for name, splits in files.items()}


def run(args: argparse.Namespace) -> None:
    """Write the protocol's files."""
    prepare(protocol_of(args), args.output_dir, args.workers)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
