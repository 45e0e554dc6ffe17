"""A protocol: which corpora become which splits, how much is taken, what is filtered. YAML files describe it.

```yaml
seed: 1
pairs_per_language: 300000        # of each training split, 0: all
lines_per_language: 1000000       # of each monolingual training split, 0: all
filters: {max_words: 200}         # see filters.FilterOptions
parallel:
  cs-en:
    train: {hub: wmt/wmt17, config: cs-en, split: train}
    valid: my/valid.cs-en.tsv.gz
    test: {sacrebleu: wmt17}      # any split but train and valid is a test set
monolingual:
  cs:
    train: [news.cs.gz, more/*.zst]
```

Source: Mix-MoE (arXiv:2605.24681) section IV-A; `paper.yaml` beside this file is its protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.data.preparation.filters import FilterOptions
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.data.preparation.words import from_words, load_words
from mixmoe_megatron.errors import MixMoEError

Splits = Mapping[str, Source]
PRESETS = ("paper",)


@dataclass(frozen=True)
class Protocol:
    """What to prepare.

    Attributes:
        parallel: Pair such as "cs-en" -> split -> source.
        monolingual: Language code -> split -> source.
        seed: Of the choice of training lines.
        pairs_per_language: Pairs of each parallel training split, chosen at random; 0: all, in the source's order.
        lines_per_language: The same for monolingual lines.
        filters: Of training and validation splits; test sets stay as they are.
    """

    parallel: Mapping[str, Splits] = field(default_factory=dict)
    monolingual: Mapping[str, Splits] = field(default_factory=dict)
    seed: int = 1
    pairs_per_language: int = 0
    lines_per_language: int = 0
    filters: FilterOptions = field(default_factory=FilterOptions)

    def __post_init__(self) -> None:
        """Check languages and numbers.

        Raises:
            MixMoEError: An unknown language, a pair of one language, a negative number, or nothing to prepare.
        """
        for pair in self.parallel:
            if len(pair_languages(pair)) != 2:
                raise MixMoEError(f"A pair is two language codes such as cs-en, not {pair!r}.")
        for code in self.monolingual:
            check_language(code)
        if min(self.pairs_per_language, self.lines_per_language) < 0:
            raise MixMoEError("pairs_per_language and lines_per_language must be 0 (all) or more.")
        if not self.parallel and not self.monolingual:
            raise MixMoEError("The protocol names no parallel and no monolingual text.")

    def only(self, languages: list[str]) -> Protocol:
        """Return the part of the protocol that needs no other languages than these (English always stays).

        Raises:
            MixMoEError: A language is unknown, or nothing is left.
        """
        wanted = {check_language(code) for code in languages} | {"en"}
        pairs = {pair: splits for pair, splits in self.parallel.items() if set(pair_languages(pair)) <= wanted}
        lines = {code: splits for code, splits in self.monolingual.items() if code in wanted}
        return replace(self, parallel=pairs, monolingual=lines)


def pair_languages(pair: str) -> tuple[str, ...]:
    """Split "cs-en" into its language codes.

    Raises:
        MixMoEError: A code is unknown, or both are the same.
    """
    codes = tuple(check_language(code) for code in pair.split("-"))
    if len(set(codes)) != len(codes):
        raise MixMoEError(f"Source and target language of {pair!r} are the same.")
    return codes


def load_protocol(path: str) -> Protocol:
    """Read a protocol from a YAML file, or one of the package's own by name ("paper").

    Raises:
        MixMoEError: The file is missing, is not YAML, or is no valid protocol: a key is unknown, or a value is not
            what it must be.
    """
    file = files(__package__) / f"{path}.yaml" if path in PRESETS else Path(path)
    try:
        value = load_words(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MixMoEError(
            f"Cannot read the protocol {path}: {error.strerror}; presets: {', '.join(PRESETS)}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MixMoEError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise MixMoEError(f"{path}: a protocol is a mapping with parallel and monolingual text, see --help.")
    filters = value.get("filters") or {}
    if not isinstance(filters, dict) or set(filters) - set(FilterOptions.__dataclass_fields__):
        raise MixMoEError(f"{path}: filters are a mapping of {', '.join(FilterOptions.__dataclass_fields__)}.")
    parts = {part: _splits_of(value.get(part) or {}, f"{path}: {part}") for part in ("parallel", "monolingual")}
    filters = from_words(FilterOptions, filters, f"{path}: filters")
    return from_words(Protocol, {**value, **parts, "filters": filters}, path)


def _splits_of(value: Any, where: str) -> dict[str, dict[str, Source]]:
    if not isinstance(value, dict) or not all(isinstance(splits, dict) for splits in value.values()):
        raise MixMoEError(f"{where} is a mapping: pair or language -> split -> source.")
    return {
        str(name): {
            str(split): Source.from_value(source, f"{where}.{name}.{split}") for split, source in splits.items()
        }
        for name, splits in value.items()
    }
