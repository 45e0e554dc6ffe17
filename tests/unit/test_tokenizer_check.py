"""tools/check_tokenizer.py: figures by language, what it says of special tokens, what it refuses."""

from __future__ import annotations

import gzip
import json
import runpy
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixmoe_megatron.data.prompts import PromptTemplate
from mixmoe_megatron.data.tokenizer_check import language_figures, special_token_facts
from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from tests.helpers.tiny_tokenizers import KINDS, make_tokenizer

LINES = ["Das Haus ist alt.", "", "Grüße, 世界!", "mit </s> darin", "Der  Fluss", "\u200b"]
USED = [LINES[0], *LINES[2:5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    (folder / "de.txt").write_text("\n".join(LINES), encoding="utf-8")
    for kind in KINDS:
        make_tokenizer(kind, folder)
    words = Tokenizer(models.WordLevel({"</s>": 0, "the": 1, "tree": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, unknown in (("words", "[UNK]"), ("eos_is_unknown", "</s>")):
        words.model = models.WordLevel({"</s>": 0, "the": 1, "tree": 2, "[UNK]": 3}, unk_token=unknown)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token=unknown)
        tokenizer.save_pretrained(folder / name)
    return folder


def check(*words: str | Path) -> int:
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check_tokenizer.py"))["main"]
    return main(list(map(str, words)))


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_complete_vocabularies(folder: Path, kind: str) -> None:
    tokenizer = open_tokenizer(folder / kind)
    figures = language_figures(tokenizer, "de", folder / "de.txt", 100, PromptTemplate())
    assert figures.lines == figures.restored == 4, "the empty line, and the one that looks empty, are left out"
    assert figures.bytes == sum(len(line.encode()) for line in USED)
    assert figures.tokens == sum(len(tokenizer.encode([line], add_special_tokens=False)[0]) for line in USED)
    assert figures.unknown == 0
    assert figures.joined == 4, "after ALMA's colon a translation begins a token of its own"


def test_unknown_and_lost_text(folder: Path) -> None:
    (folder / "en.txt.gz").write_bytes(gzip.compress(b"the tree\nthe the oak\nnever read"))
    figures = language_figures(open_tokenizer(folder / "words"), "en", folder / "en.txt.gz", 2, PromptTemplate())
    assert (figures.lines, figures.tokens, figures.unknown, figures.restored) == (2, 5, 1, 1)


def test_a_prompt_that_merges_with_the_translation(folder: Path) -> None:
    """A template that ends in a space: alone it is a token, before 'the' it becomes a part of ' the'."""
    tokenizer = open_tokenizer(folder / "bpe")
    (folder / "merge.txt").write_text("the house\n7 houses\n")
    template = PromptTemplate("{source}: ")
    assert language_figures(tokenizer, "en", folder / "merge.txt", 9, template).joined == 1
    assert language_figures(tokenizer, "en", folder / "merge.txt", 9, PromptTemplate()).joined == 2


def edited(source: Path, target: Path, **changes: object) -> TextTokenizer:
    """Open a copy of a tokenizer with another tokenizer_config.json; None removes an entry."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (target / "special_tokens_map.json").unlink(missing_ok=True)  # transformers 5 writes none
    return open_tokenizer(target)


def test_facts(folder: Path, tmp_path: Path) -> None:
    facts = special_token_facts(open_tokenizer(folder / "sentencepiece"))
    assert facts == [
        "EOS '</s>' (2) ends every document and every translation",
        "BOS '<s>' (1) is put before every text",
        "PAD '<pad>' (0)",
        "a text's first word is encoded with a space before it (sentencepiece)",
    ]
    bare = special_token_facts(open_tokenizer(folder / "bpe_without_bos"))
    assert bare[1] == "BOS '<s>' (1) is named but not put before a text" and bare[3].endswith("as it stands")
    assert "PAD: none" in special_token_facts(edited(folder / "bpe", tmp_path / "no_pad", pad_token=None))[2]
    assert "PAD is EOS" in special_token_facts(edited(folder / "bpe", tmp_path / "eos", pad_token="</s>"))[2]


def test_facts_to_check(folder: Path, tmp_path: Path) -> None:
    both = special_token_facts(open_tokenizer(folder / "eos_is_unknown"))
    assert both[1].startswith("CHECK: EOS is the unknown token too") and both[2] == "BOS: none"
    first = edited(folder / "bpe", tmp_path / "first", eos_token="<s>", bos_token="<s>")
    assert "CHECK: every text begins with EOS, which is BOS too" in special_token_facts(first)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--tokenizer", folder / "bpe", "--mono", f"de={folder / 'de.txt'}") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] in ("PreTrainedTokenizerFast, 450 ids", "TokenizersBackend, 450 ids")  # transformers 4, 5
    row = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert row[:2] == ["de", "4"] and float(row[2]) > 1 and row[3:] == ["0.000%", "100.0%", "100.0%"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--mono", "de"], "--mono takes one LANGUAGE=FILE"), (["--mono", "xx={}/de.txt"], "Unknown language code 'xx'"),
     (["--mono", "de={}/nothing"], "Cannot read"), (["--mono", "de={}/empty"], "holds no text"),
     (["--mono", "de={0}/de.txt", "de={0}/de.txt"], "takes one LANGUAGE=FILE for each"),
     (["--max-lines", "0"], "--max-lines must be 1 or more")],
)  # fmt: skip
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (folder / "empty").write_text("\n")
    assert check("--tokenizer", folder / "bpe", *(word.format(folder) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_eos(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "bpe", tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"})
    )
    (tmp_path / "copy" / "special_tokens_map.json").unlink(missing_ok=True)
    assert check("--tokenizer", tmp_path / "copy") == 2
    assert "no end-of-sequence token; set eos_token" in capsys.readouterr().err
