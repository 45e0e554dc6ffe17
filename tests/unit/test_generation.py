"""Batched decoding equals one segment at a time, stops early without changing the result, and can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation import generation, models
from mixmoe_megatron.evaluation.batches import pad
from mixmoe_megatron.evaluation.generation import FirstLineOrBudget, GenerationOptions, LineTable, first_line, translate
from mixmoe_megatron.evaluation.models import LoadedModel, load_model, model_fingerprint
from tests.helpers.tiny_hf import save_tiny_dense, tiny_mixmoe, tiny_tokenizer

SOURCES = ["Das Haus ist alt.", "Der Fluss fließt durch die Stadt, und die Kinder spielen im Garten.", "Ja", "河流 мир"]
PROMPTS = [f"Translate this from German to English:\nGerman: {source}\nEnglish:" for source in SOURCES]
GREEDY = GenerationOptions("greedy", max_new_tokens=12, batch_size=3)


@pytest.fixture(scope="module", params=["sentencepiece", "bpe"])
def loaded(request, tmp_path_factory) -> LoadedModel:
    path = tmp_path_factory.mktemp("model")
    save_tiny_dense(path, tokenizer=request.param)
    loaded = load_model("base", path)
    assert loaded.model.config._attn_implementation == models.GROUPED_ATTENTION
    return loaded


def reference_line(loaded: LoadedModel, prompt: str, max_new_tokens: int, **options) -> str:
    """One segment, no padding, no early stop: cut to the first line afterwards."""
    ids = loaded.tokenizer.encode([prompt], add_special_tokens=True)
    output = loaded.model.generate(input_ids=torch.tensor(ids), attention_mask=torch.ones(1, len(ids[0])).long(),
                                   max_new_tokens=max_new_tokens, do_sample=False, **options)  # fmt: skip
    return first_line(loaded.tokenizer.decode(output[0, len(ids[0]) :].tolist()))


def test_batches_equal_single_segments(loaded, tmp_path) -> None:
    lines = translate(loaded, PROMPTS, SOURCES, GREEDY, tmp_path / "partial.jsonl")
    assert lines == [reference_line(loaded, prompt, 12) for prompt in PROMPTS]
    assert any(lines)


def test_beam_search_batches_equal_single_segments(loaded, tmp_path) -> None:
    options = GenerationOptions("beam", num_beams=3, max_new_tokens=6, batch_size=4)
    lines = translate(loaded, PROMPTS, SOURCES, options, tmp_path / "partial.jsonl")
    for index, prompt in enumerate(PROMPTS):
        single = translate(loaded, [prompt], [SOURCES[index]], options, tmp_path / f"{index}.jsonl")
        assert single == [lines[index]]


def test_mixmoe_models_decode_alike_in_batches(tmp_path) -> None:
    tiny_mixmoe(stage=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    mixmoe = load_model("mixmoe", tmp_path / "model")
    lines = translate(mixmoe, PROMPTS, SOURCES, GREEDY, tmp_path / "partial.jsonl")
    assert lines == [reference_line(mixmoe, prompt, 12) for prompt in PROMPTS]


def test_stopping_at_the_line_end_does_not_change_the_line(loaded, tmp_path) -> None:
    """With newlines made likely, decoding stops early and still gives what cutting afterwards gives."""
    newline = loaded.tokenizer.encode(["a\n"], add_special_tokens=False)[0][-1]
    weight = loaded.model.get_output_embeddings().weight
    original = weight[newline].clone()
    with torch.no_grad():
        weight[newline] *= 3
        lines = translate(loaded, PROMPTS, SOURCES, GREEDY, tmp_path / "partial.jsonl")
        expected, stopped = [], 0
        for prompt in PROMPTS:
            ids = torch.tensor(loaded.tokenizer.encode([prompt], add_special_tokens=True))
            new = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
            text = loaded.tokenizer.decode(new[0, ids.shape[1] :].tolist())
            expected.append(first_line(text))
            stopped += "\n" in text.strip()
        weight[newline] = original
    assert lines == expected
    assert stopped > 0


def test_query_groups_share_keys_and_values(loaded, monkeypatch) -> None:
    """The logits of padded prompts and of a token after them are transformers' own; no head gets a copy."""
    input_ids, mask = pad(loaded.tokenizer.encode(PROMPTS, add_special_tokens=True), "left", 0, loaded.device)
    next_ids, next_mask = input_ids[:, :1], torch.nn.functional.pad(mask, (0, 1), value=1)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        first = loaded.model(input_ids, attention_mask=mask)
        then = loaded.model(next_ids, attention_mask=next_mask, past_key_values=first.past_key_values)
        return first.logits[mask == 1], then.logits

    with torch.no_grad():
        loaded.model.set_attn_implementation("sdpa")
        expected = logits()
        loaded.model.set_attn_implementation(models.GROUPED_ATTENTION)
        monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", None)  # calling it is an error
        for ours, theirs in zip(logits(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert loaded.model.config.num_key_value_heads < loaded.model.config.num_attention_heads


def test_first_line() -> None:
    assert first_line("\n  The house.\nGerman: x") == "The house."
    assert first_line(" a\u2028b") == "a"
    assert first_line("\r\n ") == ""


def test_line_table_agrees_with_first_line(loaded) -> None:
    """A row is complete exactly when more text cannot change its first line."""
    table = LineTable(loaded.tokenizer, loaded.vocab_size, torch.device("cpu"))
    texts = ["The house", "The house\n", "\n\n", "\nThe house\n", "\nThe", "The\nhouse and", " \n"]
    for text in texts:
        ids = loaded.tokenizer.encode([text], add_special_tokens=False)
        expected = len(text.lstrip().splitlines(keepends=True)) > 0 and "\n" in text.lstrip()
        assert table.is_complete(torch.tensor(ids)).tolist() == [expected], text
    assert table.has_break.any() and table.has_content.any()
    assert table.has_break.shape == (loaded.vocab_size,)


def test_budget_holds_for_each_row_and_its_beams(loaded) -> None:
    table = LineTable(loaded.tokenizer, loaded.vocab_size, torch.device("cpu"))
    eos_ids = torch.tensor(loaded.eos_ids)
    criterion = FirstLineOrBudget(table, prompt_length=2, budgets=torch.tensor([1, 3]), eos_ids=eos_ids)
    content = loaded.tokenizer.encode(["Haus"], add_special_tokens=False)[0][-1]
    rows = torch.full((4, 4), content)
    assert criterion(rows, None).tolist() == [True, True, False, False]
    assert criterion(torch.full((2, 5), content), None).tolist() == [True, True]


@pytest.mark.parametrize("can_drop_rows", [True, False])
def test_rows_that_have_ended_leave_the_batch(loaded, tmp_path, monkeypatch, can_drop_rows) -> None:
    """Budgets of 16 to 60 tokens: each row gets its own, and the model computes no more rows than go on."""
    if not can_drop_rows:
        monkeypatch.setattr(generation, "DynamicCache", StaticCache)  # no cache is one
    options = GenerationOptions("greedy", max_new_tokens=60, max_length_ratio=1.0, batch_size=8)
    sources, prompts = SOURCES + SOURCES[1:] + ["Haus " * 9], PROMPTS + PROMPTS[1:] + [PROMPTS[0].replace("ist", "ja")]
    rows: list[tuple[int, int]] = []  # and columns, of each forward pass
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    lines = translate(loaded, prompts, sources, options, tmp_path / "partial.jsonl")
    hook.remove()
    one_by_one = replace(options, batch_size=1)
    assert lines == translate(loaded, prompts, sources, one_by_one, tmp_path / "one_by_one.jsonl")
    counts = [count for count, _ in rows]
    assert counts[0] == 8 and counts[-1] <= 2 and counts == sorted(counts, reverse=True)
    read_again = sum(length > 1 for _, length in rows[1:])
    assert (read_again == 0) == can_drop_rows


def test_budget_follows_the_source(loaded, tmp_path) -> None:
    options = GenerationOptions("greedy", max_new_tokens=100, max_length_ratio=2.0)
    assert [options.budget(tokens) for tokens in (0, 5, 50)] == [16, 26, 100]
    assert GenerationOptions().budget(3) == 256
    tight = GenerationOptions("greedy", max_new_tokens=3, batch_size=4)
    lines = translate(loaded, PROMPTS, SOURCES, tight, tmp_path / "partial.jsonl")
    assert lines == [reference_line(loaded, prompt, 3) for prompt in PROMPTS]


def test_an_interrupted_translation_is_continued(loaded, tmp_path, monkeypatch) -> None:
    whole = translate(loaded, PROMPTS, SOURCES, GREEDY, tmp_path / "whole.jsonl")
    partial = tmp_path / "partial.jsonl"
    options = GenerationOptions("greedy", max_new_tokens=12, batch_size=2)
    original, calls = generation._generate_batch, []

    def fail_in_second_batch(*args):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(generation, "_generate_batch", fail_in_second_batch)
    with pytest.raises(KeyboardInterrupt):
        translate(loaded, PROMPTS, SOURCES, options, partial)
    assert len(partial.read_text(encoding="utf-8").splitlines()) == 2
    with partial.open("a", encoding="utf-8") as stream:
        stream.write('{"index": 0, "hypo')  # killed while writing
    assert translate(loaded, PROMPTS, SOURCES, options, partial) == whole
    assert calls == [2, 2, 2]
    assert sorted(json.loads(line)["index"] for line in partial.read_text(encoding="utf-8").splitlines()) == [
        0,
        1,
        2,
        3,
    ]
    with pytest.raises(MixMoEError, match="more segments"):
        translate(loaded, PROMPTS[:1], SOURCES[:1], options, partial)


@pytest.mark.parametrize(
    "fields",
    [{"decoding": "sample"}, {"num_beams": 1}, {"batch_size": 0}, {"max_new_tokens": 0}, {"max_length_ratio": 0.0}],
)
def test_options_out_of_range(fields) -> None:
    with pytest.raises(MixMoEError):
        GenerationOptions(**fields)


def test_models_that_cannot_be_loaded(tmp_path) -> None:
    with pytest.raises(MixMoEError, match=r"'base'.*no config\.json"):
        load_model("base", tmp_path)
    save_tiny_dense(tmp_path / "model")
    with pytest.raises(MixMoEError, match="dtype"):
        load_model("base", tmp_path / "model", dtype="int8")
    settings = tmp_path / "model" / "tokenizer_config.json"
    tokens = tmp_path / "model" / "special_tokens_map.json"
    for path in filter(Path.exists, (settings, tokens)):  # transformers 5 writes no special_tokens_map.json
        values = json.loads(path.read_text(encoding="utf-8"))
        values["eos_token"] = None
        path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(MixMoEError, match="no end-of-sequence token"):
        load_model("base", tmp_path / "model")


def test_absolute_positions_are_not_exceeded(loaded, tmp_path, monkeypatch) -> None:
    options = GenerationOptions("greedy", max_new_tokens=300)
    monkeypatch.setattr(LoadedModel, "has_rotary_positions", False)
    with pytest.raises(MixMoEError, match="exceed the model's 256 positions"):
        translate(loaded, PROMPTS, SOURCES, options, tmp_path / "partial.jsonl")


def test_shipped_sampling_settings_are_ignored(tmp_path) -> None:
    model = save_tiny_dense(tmp_path)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 5])
    model.generation_config.save_pretrained(tmp_path)
    loaded = load_model("base", tmp_path)
    assert loaded.eos_ids == (2, 5)
    lines = [translate(loaded, PROMPTS, SOURCES, GREEDY, tmp_path / f"{run}.jsonl") for run in range(2)]
    assert lines[0] == lines[1]


def test_fingerprint_sees_weights_and_not_the_place(tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_tiny_dense(tmp_path / name, seed=seed)
    assert model_fingerprint(tmp_path / "a") == model_fingerprint(tmp_path / "b") != model_fingerprint(tmp_path / "c")
    with pytest.raises(MixMoEError, match="no model directory"):
        model_fingerprint(tmp_path / "d")
