"""Parallel token files: pairs, filters and directions; samples, loss mask, order, collation."""

from __future__ import annotations

import json
import pickle
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mixmoe_megatron.data.monolingual import MonolingualOptions, build_monolingual
from mixmoe_megatron.data.parallel import GROUP_SIZE, ParallelDataset, collate, epoch_order, target_share
from mixmoe_megatron.data.parallel_build import ParallelOptions, build_parallel, build_text_beside_pairs
from mixmoe_megatron.data.prompts import PromptTemplate, encode_prompts
from mixmoe_megatron.data.storage import TokenFileWriter, read_manifest
from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.tiny_tokenizers import KINDS, make_tokenizer

ROWS = [("The house is old.", "Das Haus ist alt."), ("The river.", "Der Fluss."), ("Play!", "Spielt im Garten!")]
OPTIONS = ParallelOptions("de", "en", source_column="xx")
BOTH = ParallelOptions("de", "en", source_column="xx", both_directions=True)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(make_tokenizer("bpe", tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def numbered(bpe: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of 100 pairs of very different lengths."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = [(f"{number} {'tree ' * (number * 37 % 50)}", f"{number} Baum") for number in range(100)]
    build_parallel([write_pairs(folder / "pairs.tsv", rows)], bpe, folder / "pairs", OPTIONS)
    return folder / "pairs"


def write_pairs(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = ["page\ten\txx", *(f"p\t{english}\t{other}" for english, other in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_document_is_prompt_and_target(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.tsv", ROWS)
    manifest = build_parallel([source], tokenizer, tmp_path / "pairs", OPTIONS)
    file = IndexedDataset(str(tmp_path / "pairs"), multimodal=True)
    assert list(file.document_indices) == [0, 2, 4, 6]
    for row, (english, german) in enumerate(ROWS):
        (prompt, mode), (target, _) = file[2 * row], file[2 * row + 1]
        text = f"Translate this from German to English:\nGerman: {german}\nEnglish:"
        assert list(prompt) == tokenizer.encode([text], add_special_tokens=True)[0]  # what generation is fed
        assert target[-1] == tokenizer.eos_id
        assert tokenizer.decode([*prompt, *target]) == f"{text} {english}"
        assert mode == 0
    assert manifest["directions"] == ["de-en"] and manifest["documents"] == 3
    assert "target_encoded_alone" not in manifest["counts"]


def test_both_directions(bpe: TextTokenizer, tmp_path: Path) -> None:
    build_parallel([write_pairs(tmp_path / "pairs.tsv", ROWS)], bpe, tmp_path / "pairs", BOTH)
    manifest = read_manifest(tmp_path / "pairs", "parallel")
    assert manifest["documents_per_direction"] == {"de-en": 3, "en-de": 3}
    dataset = ParallelDataset(tmp_path / "pairs", 6, shuffle=False)
    assert [dataset.directions[dataset[index]["direction"]] for index in range(6)] == ["de-en", "en-de"] * 3
    german = bpe.decode(dataset[1]["tokens"])
    assert german == f"Translate this from English to German:\nEnglish: {ROWS[0][0]}\nGerman: {ROWS[0][1]}"


def test_filters_are_counted(bpe: TextTokenizer, tmp_path: Path) -> None:
    rows = [
        *ROWS, ROWS[0], ("", "leer"), ("a\0b", "c"), ("one", "eins </s>"), ("line\u2028break", "x"),
        ("w " * 200, "ok"), ("ok", "w " * 201),
    ]  # fmt: skip
    manifest = build_parallel([write_pairs(tmp_path / "pairs.tsv", rows)], bpe, tmp_path / "pairs", BOTH)
    assert manifest["counts"] == {
        "read": 10, "kept": 10, "dropped_duplicate": 1, "dropped_empty": 1, "dropped_control_character": 2,
        "dropped_too_many_words": 1,
    }  # fmt: skip


def test_texts_that_look_empty_or_alike_count_as_such(bpe: TextTokenizer, tmp_path: Path) -> None:
    german, english = ROWS[0]
    rows = [ROWS[0], (f"\u200b{german}", english.replace(" ", "\u00a0")), ("\u200b", "x"), ("x", "\u00ad\u3164")]
    counts = build_parallel([write_pairs(tmp_path / "pairs.tsv", rows)], bpe, tmp_path / "pairs", OPTIONS)["counts"]
    assert counts == {"read": 4, "kept": 1, "dropped_duplicate": 1, "dropped_empty": 2}


def test_special_tokens_in_a_pair_are_text_and_those_of_the_template_are_meant(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "pairs.tsv", [("the <s>old</s> house", "das <s>alte</s> Haus")])
    template = PromptTemplate("</s>{source_language}: {source}</s>")
    options = ParallelOptions("de", "en", source_column="xx", target_column="en", template=template)
    build_parallel([source], tokenizer, tmp_path / "pairs", options)
    file = IndexedDataset(str(tmp_path / "pairs"), multimodal=True)
    (prompt, _), (target, _) = file[0], file[1]
    assert list(prompt) == encode_prompts(tokenizer, [template.render("das <s>alte</s> Haus", "de", "en")])[0]
    assert [token for token in prompt if token in (1, 2)] == [*([1] if tokenizer.bos_id else []), 2, 2]
    assert [token for token in target if token in (1, 2)] == [2] and target[-1] == tokenizer.eos_id
    assert tokenizer.decode(target).strip() == "the <s>old</s> house"


def test_word_limits_count_characters_of_chinese(bpe: TextTokenizer, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.tsv", [("a b", "一二三四"), ("a b", "一二")])
    options = ParallelOptions("zh", "en", source_column="xx", min_words=2, max_words=3)
    counts = build_parallel([source], bpe, tmp_path / "pairs", options)["counts"]
    assert counts == {"read": 2, "kept": 1, "dropped_too_many_words": 1}
    german = ParallelOptions("de", "en", source_column="xx", min_words=2)
    with pytest.raises(MixMoEError, match=r"No pair is left of .*2 dropped too few words"):
        build_parallel([source], bpe, tmp_path / "pairs", german)


def test_text_beside_pairs_predicts_every_token_once(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lines = ["the old house stands by the river " * 3, "the river is long and the house is old again"]
    (tmp_path / "text").write_text("\n".join(lines), "utf-8")
    build_parallel([write_pairs(tmp_path / "pairs.tsv", ROWS)], tokenizer, tmp_path / "pairs", BOTH)
    manifest = build_text_beside_pairs([tmp_path / "text"], tokenizer, tmp_path / "beside", 12)
    dataset = ParallelDataset([tmp_path / "pairs", tmp_path / "beside"], shuffle=False)
    assert dataset.directions == ["de-en", "en-de", "text"] and manifest["counts"]["read"] == 2
    samples = [dataset[index] for index in range(6, dataset.num_documents)]
    assert all(dataset.directions[sample["direction"]] == "text" for sample in samples)
    assert all(sample["loss_mask"].all() and len(sample["tokens"]) <= 11 for sample in samples)
    predicted = [int(label) for sample in samples for label in sample["labels"]]
    whole = [
        [*ids, tokenizer.eos_id] for ids in tokenizer.encode([line.strip() for line in lines], add_special_tokens=True)
    ]
    assert predicted == [token for ids in whole for token in ids[1:]]
    with pytest.raises(MixMoEError, match="--beside-pairs must be 2 or more"):
        build_text_beside_pairs([tmp_path / "text"], tokenizer, tmp_path / "none", 1)


def test_max_tokens_drops_and_never_cuts(bpe: TextTokenizer, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.tsv", ROWS)
    build_parallel([source], bpe, tmp_path / "all", OPTIONS)
    file = IndexedDataset(str(tmp_path / "all"))  # named: its arrays are views that die with it
    lengths = file.sequence_lengths.reshape(-1, 2).sum(axis=1)
    limit = int(sorted(lengths)[1])
    options = ParallelOptions("de", "en", source_column="xx", max_tokens=limit)
    manifest = build_parallel([source], bpe, tmp_path / "some", options)
    assert manifest["counts"] == {"read": 3, "kept": 2, "dropped_too_many_tokens": 1}
    ParallelDataset(tmp_path / "some", 1, max_length=limit - 1)
    with pytest.raises(MixMoEError, match=rf"build the data again with --max-tokens {limit - 1}"):
        ParallelDataset(tmp_path / "some", 1, max_length=limit - 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_language": "de"}, "both 'de'"),
        ({"source_language": "xx"}, "Unknown language code 'xx'"),
        ({"source_column": "en"}, "column are both 'en'"),
        ({"min_words": 0}, "must be 1 or more"),
        ({"min_words": 9, "max_words": 8}, "in order"),
        ({"max_tokens": 1}, "must be 2 or more"),
    ],
)
def test_wrong_options(changes: dict[str, object], message: str) -> None:
    with pytest.raises(MixMoEError, match=message):
        ParallelOptions(**({"source_language": "de", "target_language": "en"} | changes))


def test_loss_counts_where_the_label_is_target_or_eos(bpe: TextTokenizer, numbered: Path) -> None:
    sample = ParallelDataset(numbered, 1, shuffle=False)[0]
    file = IndexedDataset(str(numbered))
    prompt, target = file[0:2]
    whole = np.concatenate([prompt, target])
    assert np.array_equal(sample["tokens"], whole[:-1]) and np.array_equal(sample["labels"], whole[1:])
    assert np.array_equal(sample["labels"][sample["loss_mask"] == 1], target)  # its first token and EOS included
    assert [sample[key].dtype for key in ("tokens", "labels", "loss_mask")] == [np.int64, np.int64, np.float32]
    assert ParallelDataset(numbered, 1, shuffle=False, loss_on="all")[0]["loss_mask"].all()


def test_the_share_of_labels_with_loss(numbered: Path) -> None:
    documents = ParallelDataset(numbered)
    masks = [documents.document(number)["loss_mask"] for number in range(documents.num_documents)]
    share = np.concatenate(masks).mean()
    assert target_share([numbered]) == target_share([numbered, numbered]) == pytest.approx(share) and 0 < share < 1


def test_each_epoch_holds_each_document_once(numbered: Path) -> None:
    dataset = ParallelDataset(numbered, 350, seed=3)
    order = [dataset.document_index(index) for index in range(350)]
    for epoch in range(3):
        assert sorted(order[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert order[:100] != order[100:200] and order[:100] != sorted(order[:100])
    with pytest.raises(IndexError):
        dataset[350]


def test_groups_hold_similar_lengths_and_stay_aligned_over_epochs() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)  # no multiple of a group: epochs begin inside one
    order = np.concatenate([epoch_order(lengths, epoch, 1) for epoch in range(4)])
    groups = lengths[order[: len(order) // GROUP_SIZE * GROUP_SIZE]].reshape(-1, GROUP_SIZE)
    starts = np.arange(len(groups)) * GROUP_SIZE
    inside = starts // 5000 == (starts + GROUP_SIZE - 1) // 5000
    spread = np.ptp(groups, axis=1)
    assert np.median(spread[inside]) < 50 and inside.sum() > 300
    means = groups[inside].mean(axis=1)
    assert np.any(np.diff(means) > 0) and np.any(np.diff(means) < 0)  # the groups themselves come in random order


@pytest.mark.parametrize(("documents", "group_size"), [(1, 1), (5, 8), (8, 8), (20, 8), (1000, 3)])
def test_order_is_a_permutation_whatever_the_sizes(documents: int, group_size: int) -> None:
    lengths = np.arange(documents) % 7
    for epoch in range(4):
        assert sorted(epoch_order(lengths, epoch, 0, group_size)) == list(range(documents))


def test_order_depends_on_seed_alone(numbered: Path) -> None:
    def order(num_samples: int, seed: int = 5) -> list[int]:
        dataset = ParallelDataset(numbered, num_samples, seed=seed)
        return [dataset.document_index(index) for index in reversed(range(num_samples))][::-1]

    assert order(250) == order(250)
    assert order(150) == order(250)[:150]
    assert order(150) != order(150, seed=6)


@pytest.mark.parametrize("batches", [(8, 16), (16, 8), (64, 3), (5, 128)])
def test_going_on_with_another_batch_size_takes_each_document_once(numbered: Path, batches: tuple[int, int]) -> None:
    """The two halves of an epoch, as the callers of before gave the batch size."""
    seen = []
    with pytest.warns(DeprecationWarning, match="does not depend on it"):
        for batch, half in zip(batches, (range(40), range(40, 100)), strict=True):
            dataset = ParallelDataset(numbered, 100, seed=1, group_size=batch)
            seen += [dataset.document_index(index) for index in half]
    assert sorted(seen) == list(range(100))


def test_workers_and_processes_see_the_same(bpe: TextTokenizer, numbered: Path) -> None:
    dataset = ParallelDataset(numbered, 40, seed=2)
    copied = pickle.loads(pickle.dumps(dataset))
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=4, num_workers=workers, collate_fn=partial(collate, pad_id=0))
        for part, workers in ((dataset, 0), (copied, 2))
    ]
    for here, there in zip(*loaders, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_several_files_are_joined(bpe: TextTokenizer, numbered: Path, tmp_path: Path) -> None:
    build_parallel([write_pairs(tmp_path / "pairs.tsv", ROWS)], bpe, tmp_path / "pairs", BOTH)
    dataset = ParallelDataset([numbered, tmp_path / "pairs"], 106, shuffle=False)
    assert (dataset.num_documents, dataset.directions) == (106, ["de-en", "en-de"])
    assert [dataset[index]["direction"] for index in (99, 100, 101)] == [0, 0, 1]
    assert bpe.decode(dataset[104]["labels"]).endswith(ROWS[2][0])


def test_collate_pads_on_the_right(bpe: TextTokenizer, numbered: Path) -> None:
    dataset = ParallelDataset(numbered, 4, seed=0)
    samples = [dataset[index] for index in range(4)]
    longest = max(len(sample["tokens"]) for sample in samples)
    batch = collate(samples, pad_id=9, pad_multiple=16)
    width = -(-longest // 16) * 16
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((4, width), torch.int64), "labels": ((4, width), torch.int64),
        "loss_mask": ((4, width), torch.float32), "position_ids": ((4, width), torch.int64),
        "padding_mask": ((4, width), torch.bool),
    }  # fmt: skip
    for row, sample in enumerate(samples):
        length = len(sample["tokens"])
        assert np.array_equal(batch["tokens"][row, :length], sample["tokens"])
        assert batch["padding_mask"][row].tolist() == [False] * length + [True] * (width - length)
        assert (batch["tokens"][row, length:] == 9).all() and (batch["labels"][row, length:] == 9).all()
        assert batch["loss_mask"][row].sum() == sample["loss_mask"].sum()
        assert torch.equal(batch["position_ids"][row], torch.arange(width))
    assert collate(samples, pad_id=0, pad_multiple=512, max_length=longest + 1)["tokens"].shape == (4, longest + 1)
    fixed = collate(samples, pad_id=0, max_length=longest + 50, pad_to_max=True)
    assert fixed["tokens"].shape == (4, longest + 50)
    with pytest.raises(MixMoEError, match="more than the sequence length"):
        collate(samples, pad_id=0, max_length=longest - 1)
    with pytest.raises(MixMoEError, match="pad_to_max needs max_length"):
        collate(samples, pad_id=0, pad_to_max=True)


def test_wrong_files_and_arguments(
    bpe: TextTokenizer, numbered: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(MixMoEError, match="does not exist; build the data"):
        ParallelDataset(tmp_path / "nowhere", 1)
    with pytest.raises(MixMoEError, match="No parallel data"):
        ParallelDataset([], 1)
    with pytest.raises(MixMoEError, match="must be 1 or more"):
        ParallelDataset(numbered, 0)
    with pytest.raises(MixMoEError, match="loss_on must be"):
        ParallelDataset(numbered, 1, loss_on="prompt")  # type: ignore[arg-type]
    source = write_pairs(tmp_path / "pairs.tsv", ROWS)
    other = open_tokenizer(make_tokenizer("sentencepiece", tmp_path_factory.mktemp("other")))
    build_parallel([source], other, tmp_path / "other", OPTIONS)
    with pytest.raises(MixMoEError, match="built with different tokenizers"):
        ParallelDataset([numbered, tmp_path / "other"], 1)
    build_monolingual([source], bpe, tmp_path / "mono", MonolingualOptions(min_tokens=0))
    with pytest.raises(MixMoEError, match="holds monolingual data where parallel data is needed"):
        ParallelDataset(tmp_path / "mono", 1)
    manifest = read_manifest(tmp_path / "mono") | {"kind": "parallel", "directions": ["de-en"]}
    (tmp_path / "mono.json").write_text(json.dumps(manifest))
    with pytest.raises(MixMoEError, match=r"mono\.idx is not the index of parallel data"):
        ParallelDataset(tmp_path / "mono", 1)
    with TokenFileWriter(tmp_path / "odd", bpe.vocab_size, with_modes=True) as writer:
        writer.add([[1], [2], [3]])
        writer.commit({"kind": "parallel", "directions": ["de-en"], "tokenizer": bpe.describe()})
    with pytest.raises(MixMoEError, match="two sequences a document"):
        ParallelDataset(tmp_path / "odd", 1)


def test_the_command(bpe: TextTokenizer, tmp_path: Path, repo_root: Path) -> None:
    command = runpy.run_path(str(repo_root / "tools" / "preprocess_data.py"))["main"]
    (tmp_path / "template").write_text("{source_language}: {source}\n{target_language}:\n", encoding="utf-8")
    source = repo_root / "examples" / "data" / "de-en.valid.tsv.gz"
    arguments = ["parallel", "--input", str(source), "--source-language", "de", "--target-language", "en"]
    arguments += ["--source-column", "xx", "--both-directions", "--max-tokens", "513", "--output-prefix"]
    arguments += [str(tmp_path / "pairs"), "--tokenizer", str(bpe.directory)]
    status = command([*arguments, "--prompt-template", str(tmp_path / "template")])
    manifest = read_manifest(tmp_path / "pairs", "parallel")
    counts = manifest["counts"]
    assert status == 0
    assert counts["kept"] + counts["dropped_too_many_tokens"] == 2 * counts["read"] == 2 * 768
    assert manifest["options"]["template"]["text"] == "{source_language}: {source}\n{target_language}:"
    dataset = ParallelDataset(tmp_path / "pairs", 10, max_length=512)
    assert bpe.decode(dataset[0]["tokens"]).startswith(("German: ", "English: "))
