"""The prompt's wording, user templates, and training tokens equal to generation tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmoe_megatron.data.languages import LANGUAGE_NAMES, count_words, language_name
from mixmoe_megatron.data.prompts import PromptTemplate, encode_pairs, encode_prompts, load_template, target_separator
from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.tiny_tokenizers import KINDS, make_tokenizer

TARGETS = ["The house.", "“Quoted” text", "(in brackets)", "1984 was a year", "世界，你好", "Дом", "...", "a  b"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer")))


def test_default_wording() -> None:
    prompt = PromptTemplate().render("Das {Haus}.", "de", "en")
    assert prompt == "Translate this from German to English:\nGerman: Das {Haus}.\nEnglish:"


def test_user_template(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_text("{{{source_language}}} {source} = {target_language}\n\n", encoding="utf-8")
    assert load_template(path).render("Haus", "de", "en") == "{German} Haus = English\n"
    assert load_template(None) == PromptTemplate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no field", "exactly once"),
        ("{source} {source}", "exactly once"),
        ("{source} {model}", "unknown field 'model'"),
        ("{source.upper}", r"unknown field 'source\.upper'"),
        ("{source!r}", "unknown field 'source!r'"),
        ("{source:>9}", "unknown field 'source:>9'"),
        ("{} {source}", "unknown field ''"),
        ("{source", "broken braces"),
    ],
)
def test_wrong_templates(text: str, message: str) -> None:
    with pytest.raises(MixMoEError, match=message):
        PromptTemplate(text)


def test_unreadable_template(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match="Cannot read the prompt template"):
        load_template(tmp_path / "nowhere")


def test_languages() -> None:
    assert language_name("zh") == "Chinese"
    assert {"cs", "de", "ru", "tr", "zh", "fi", "et", "en"} <= set(LANGUAGE_NAMES)
    with pytest.raises(MixMoEError, match="Unknown language code 'xx'"):
        language_name("xx")
    assert count_words("ein  kleines Haus", "de") == 3
    assert count_words("一个 小房子", "zh") == 5


def test_training_tokens_are_generation_tokens(tokenizer: TextTokenizer) -> None:
    prompts = [PromptTemplate().render(source, "de", "en") for source in TARGETS]
    pairs = encode_pairs(tokenizer, prompts, TARGETS)
    assert pairs.prompts == encode_prompts(tokenizer, prompts)
    assert pairs.prompts == [tokenizer.hf(prompt)["input_ids"] for prompt in prompts]  # what model.generate is fed
    assert pairs.encoded_alone == 0
    for prompt, target, prompt_ids, target_ids in zip(prompts, TARGETS, pairs.prompts, pairs.targets, strict=True):
        assert target_ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in target_ids[:-1]
        whole = tokenizer.encode([f"{prompt} {target}"], add_special_tokens=True)[0]
        assert prompt_ids + target_ids[:-1] == whole  # the model's own training text, token by token
        generated = tokenizer.decode(prompt_ids + target_ids)[len(tokenizer.decode(prompt_ids)) :]
        assert generated == f" {target}"


def test_a_target_on_a_new_line(tokenizer: TextTokenizer) -> None:
    prompt = "German: Haus\nEnglish:\n"
    assert target_separator(prompt) == ""
    pairs = encode_pairs(tokenizer, [prompt], ["house"])
    assert tokenizer.decode(pairs.prompts[0] + pairs.targets[0]) == f"{prompt}house"


def test_a_merge_across_the_boundary_leaves_the_prompt_as_at_generation(tokenizer: TextTokenizer) -> None:
    """A template that ends in a space: alone it is a token, before 'the' it becomes a part of ' the'."""
    prompts, targets = ["German: Haus\nEnglish: "], ["the house"]
    whole = tokenizer.encode([prompts[0] + targets[0]], add_special_tokens=True)[0]
    pairs = encode_pairs(tokenizer, prompts, targets)
    assert pairs.prompts == encode_prompts(tokenizer, prompts)
    assert whole[: len(pairs.prompts[0])] != pairs.prompts[0]
    assert pairs.encoded_alone == 1
    generated = tokenizer.decode(pairs.prompts[0] + pairs.targets[0])[len(prompts[0]) :]
    assert generated.strip() == targets[0]
