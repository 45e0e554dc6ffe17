"""The words of a protocol file are what the user typed, and numbers only where a number is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmoe_megatron.data.preparation.protocol import load_protocol
from mixmoe_megatron.data.preparation.sources import Source
from tools import prepare_data

WORDS = """
seed: 7
pairs_per_language: "200"
filters: {max_words: 100, max_length_ratio: 3, drop_copies: yes}
parallel:
  no-en:
    on: 2020
    2020-01-01: {files: [1e3, 0x10, off], columns: {no: yes, en: 12:30}, max_rows: 0}
    train: {hub: some/set, config: no, revision: 1234567, split: on, data_files: [1_000]}
    null: {aligned: &sides {no: true, en: ~}}
monolingual:
  no: {train: no.txt, y: &more {sacrebleu: 3.14, config: }, off: {<<: *more, config: null}}
"""


def test_words_are_what_was_typed(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("\ufeff" + WORDS.replace("en: ~", "en: n"), "utf-8")
    protocol = load_protocol(str(tmp_path / "p.yaml"))
    assert (protocol.seed, protocol.pairs_per_language) == (7, 200)
    filters = protocol.filters
    assert (filters.max_words, filters.max_length_ratio, filters.drop_copies) == (100, 3.0, True)
    assert protocol.parallel == {
        "no-en": {
            "on": Source(files=("2020",)),
            "2020-01-01": Source(files=("1e3", "0x10", "off"), columns={"no": "yes", "en": "12:30"}),
            "train": Source(hub="some/set", config="no", revision="1234567", split="on", data_files=("1_000",)),
            "null": Source(aligned={"no": "true", "en": "n"}),
        }
    }
    source = Source(sacrebleu="3.14")
    assert protocol.monolingual == {"no": {"train": Source(files=("no.txt",)), "y": source, "off": source}}


BAD = {
    "seed: 1.5": "seed is a whole number, not '1.5'",
    "seed: on": "seed is a whole number, not 'on'",
    "lines_per_language:": "lines_per_language is a whole number, not None",
    "filters: {max_words: many}": "filters: max_words is a whole number, not 'many'",
    "filters: {max_words: '['}": "filters: max_words is a whole number, not '['",
    "filters: {max_words: 'a: b: c'}": "filters: max_words is a whole number, not 'a: b: c'",
    "filters: {drop_copies: 1}": "filters: drop_copies is true or false, not '1'",
    "filters: {max_length_ratio: no}": "filters: max_length_ratio is a number, not 'no'",
    "monolingual: {no: {train: {files: a, max_rows: few}}}": "no.train: max_rows is a whole number, not 'few'",
    "monolingual: {no: {train: {aligned: a}}}": "no.train: aligned is a mapping of language codes, not 'a'",
    "monolingual: {no: {train: {hub: a, columns: {no: }}}}": "no.train: columns is a mapping of language codes",
    "monolingual: {no: {train: {files: {a: b}}}}": "no.train: files is a word, or a list of files",
    "monolingual: {no: {train: a, train: b}}": "the key 'train' comes twice",
    "monolingual: {no: {train: a}, de: {train: b}, no: {train: b}}": "the key 'no' comes twice",
}


@pytest.mark.parametrize("text", BAD)
def test_a_word_where_a_number_is_wanted(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text(text + "\n", "utf-8")
    words = ["--output-dir", str(tmp_path / "out"), "--protocol", str(tmp_path / "p.yaml")]
    assert prepare_data.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and BAD[text] in error
