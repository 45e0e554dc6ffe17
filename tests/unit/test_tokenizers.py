"""Opening tokenizers, what they tell of themselves, and the sentences for unfit ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_propagation, enable_propagation

from mixmoe_megatron.checkpoint.metadata import Metadata, write_metadata
from mixmoe_megatron.data.tokenizers import (
    Prompt,
    TextTokenizer,
    check_tokenizer_fits_model,
    count_ids,
    open_tokenizer,
)
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import PHASES
from tests.helpers.tiny_tokenizers import KINDS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: open_tokenizer(make_tokenizer(kind, base)) for kind in KINDS}


def edit_config(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder and change its tokenizer_config.json; None removes an entry."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (target / "special_tokens_map.json").unlink(missing_ok=True)  # transformers 5 writes none
    return target


def test_ids_and_sizes(tokenizers: dict[str, TextTokenizer]) -> None:
    llama, bpe, bare = (tokenizers[kind] for kind in KINDS)
    assert llama.vocab_size == len(llama.hf) and bpe.vocab_size == len(bpe.hf)
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (1, 2, 0)
    assert bare.bos_id is None
    assert llama.adds_prefix_space and not bpe.adds_prefix_space
    assert {"<s>", "</s>"} <= set(llama.special_tokens)
    assert llama.spells_special_token("about </s> tags") and not llama.spells_special_token("about s tags")


def test_no_other_model_is_taken_for_a_mistral(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 4.57.6 says of large vocabularies beside a config that it wrote that they are tokenised wrongly."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100_001)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(tmp_path)
    config = {"model_type": "qwen2", "transformers_version": "4.57.6", "vocab_size": 100_001}
    (tmp_path / "config.json").write_text(json.dumps(config))
    enable_propagation()
    try:
        open_tokenizer(tmp_path)
    finally:
        disable_propagation()
    assert "incorrect regex" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["none", "added token", "named token", "sentencepiece alone"])
def test_ids_are_counted_without_transformers(
    tokenizers: dict[str, TextTokenizer], tmp_path: Path, kind: str, change: str
) -> None:
    """A token that is only named, and stands in no vocabulary, gets an id of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(tokenizers[kind].directory, folder)
    expected = tokenizers[kind].vocab_size
    if change == "added token":
        hf = open_tokenizer(folder).hf
        expected += hf.add_tokens(["<one>", "<two>"])
        hf.save_pretrained(folder)
    elif change == "named token":
        shutil.rmtree(folder)
        expected += 1
        edit_config(tokenizers[kind].directory, folder, pad_token="<fill>")
    elif change == "sentencepiece alone":
        if kind != "sentencepiece":
            (folder / "tokenizer.json").write_text("[]")
            with pytest.raises(MixMoEError, match="does not hold a JSON object"):
                count_ids(folder)
            return
        (folder / "tokenizer.json").unlink()
    assert count_ids(folder) == expected
    assert change == "sentencepiece alone" or open_tokenizer(folder).vocab_size == expected
    assert count_ids(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"model": {"vocab": 5}}'),
        ("tokenizer.json", '{"model": [1]}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 3}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "u"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"bos_token": ["x"]}'),
        ("added_tokens.json", '{"u": "70"}'),
        ("tokenizer.model", "no sentencepiece"),
    ],
)
def test_odd_tokenizer_files_are_told_in_a_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}' if name != "tokenizer.model" else "{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(MixMoEError, match="are not as transformers writes them"):
        count_ids(tmp_path)


def test_a_tokenizer_beside_a_model_with_fewer_rows(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    """A Hugging Face directory, or the tokenizer directory of a checkpoint."""
    ids = tokenizers["bpe"].vocab_size
    folder = shutil.copytree(tokenizers["bpe"].directory, tmp_path / "run" / "tokenizer")
    for rows in (ids, ids - 1):
        metadata = Metadata(PHASES["dense"], None, {"vocab_size": rows}, {})
        write_metadata(tmp_path / "run", metadata)
        (folder / "config.json").unlink(missing_ok=True)
        for _ in range(2):
            if rows == ids:
                open_tokenizer(folder)
            else:
                with pytest.raises(MixMoEError, match=f"has {ids} ids but the model's embedding has only {rows} rows"):
                    open_tokenizer(folder)
            (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))


def test_padding_id_falls_back_to_eos(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    folder = edit_config(tokenizers["bpe"].directory, tmp_path / "copy", pad_token=None)
    assert open_tokenizer(folder).pad_id == 2


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    text = "Grüße, 世界!\nПривет  мир"
    bare, special = (tokenizer.encode([text], add_special_tokens=flag)[0] for flag in (False, True))
    assert special == ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + bare
    assert tokenizer.decode(special) == text
    assert tokenizer.encode([], add_special_tokens=True) == []


def test_fingerprint_is_of_the_behaviour_not_of_the_files(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    for tokenizer in tokenizers.values():
        folder = tmp_path / tokenizer.directory.name
        tokenizer.hf.save_pretrained(folder)
        assert open_tokenizer(folder).fingerprint() == tokenizer.fingerprint()
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers.values()}) == len(KINDS)


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match="does not exist"):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(MixMoEError, match="No tokenizer in"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MixMoEError, match="Cannot read the tokenizer"):
        open_tokenizer(tmp_path)


def test_no_eos(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    folder = edit_config(tokenizers["bpe"].directory, tmp_path / "copy", eos_token=None)
    with pytest.raises(MixMoEError, match="no end-of-sequence token"):
        open_tokenizer(folder)


def test_a_tokenizer_that_ends_every_text_is_refused(tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    folder = edit_config(tokenizers["sentencepiece"].directory, tmp_path / "copy", add_eos_token=True)
    with pytest.raises(MixMoEError, match="add_eos_token"):
        open_tokenizer(folder)


def test_tokenizer_against_model(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    check_tokenizer_fits_model(tokenizer, tokenizer.vocab_size, eos_ids=[2, 7])
    too_few = tokenizer.vocab_size - 1
    with pytest.raises(MixMoEError, match=f"{tokenizer.vocab_size} ids but the model's embedding has only {too_few}"):
        check_tokenizer_fits_model(tokenizer, too_few)
    with pytest.raises(MixMoEError, match=r"end-of-sequence ids are \[7\]"):
        check_tokenizer_fits_model(tokenizer, 512, eos_ids=[7])


QUOTING = "Das <s>alte</s> Haus <pad>"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_are_text(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode([QUOTING, "ohne"], add_special_tokens=False)[0]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids).strip() == QUOTING
    assert tokenizer.inseparable_tokens == () and not tokenizer.holds_control_token(QUOTING)


@pytest.mark.skipif(
    issubclass(LlamaTokenizer, PreTrainedTokenizerFast), reason="transformers 5 has no slow Llama tokenizer"
)
def test_special_tokens_in_text_are_text_to_a_slow_tokenizer(tokenizers: dict[str, TextTokenizer]) -> None:
    slow = replace(
        tokenizers["sentencepiece"], hf=LlamaTokenizer.from_pretrained(tokenizers["sentencepiece"].directory)
    )
    assert not slow.hf.is_fast
    assert not {0, 1, 2} & set(slow.encode([QUOTING], add_special_tokens=False)[0])
    assert slow.encode([Prompt(("</s>", True))], add_special_tokens=False) == [[2]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_means_some_special_tokens_and_quotes_others(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = Prompt(("</s>user ", True), ("Haus", False), ("</s>", True))
    whole = tokenizer.hf("</s>user Haus</s>", split_special_tokens=False)["input_ids"]
    assert prompt == "</s>user Haus</s>"
    assert tokenizer.encode([prompt, "x"], add_special_tokens=True)[0] == whole
    quoting = Prompt(("</s>user ", True), (QUOTING, False), ("</s>", True)) + " die <s>"
    ids = tokenizer.encode(["x", quoting], add_special_tokens=True)[1]
    assert [token for token in ids if token in (0, 1, 2)] == [*([1] if tokenizer.bos_id else []), 2, 2]
    assert tokenizer.decode(ids).split() == f"user {QUOTING} die <s>".split()


def test_a_token_that_is_not_marked_as_special_cannot_be_told_from_text(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "the": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.inseparable_tokens == ("</s>", "[UNK]")
    assert tokenizer.holds_control_token("the </s>") and not tokenizer.holds_control_token("the <s>")


@pytest.mark.parametrize("warns", [False, True])
def test_another_reading_than_tokenizer_json_is_told(
    repo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, warns: bool
) -> None:
    """The quickstart's base puts no space before a text, and transformers 5 goes by tokenizer_config.json alone."""
    base = repo_root / "examples/quickstart/base"
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        shutil.copy(base / name, tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    assert config["add_prefix_space"] is False, "not left to the version of transformers"
    shutil.copy(base / "tokenizer_config.json", tmp_path)
    if warns:
        rules = json.loads((base / "tokenizer.json").read_text("utf-8"))
        rules["pre_tokenizer"]["prepend_scheme"] = "first"
        (tmp_path / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    open_tokenizer(tmp_path)
    assert ("encodes otherwise than tokenizer.json says" in caplog.text) == warns
