"""Data flags: the blend that Megatron gets, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training import datasets


def write_manifest(prefix: Path, kind: str, tokens: int) -> str:
    """Write a token file of no content with a manifest that says `kind` and `tokens`."""
    prefix.with_suffix(".idx").write_bytes(b"")
    prefix.with_suffix(".bin").write_bytes(b"")
    manifest = {"format_version": 1, "kind": kind, "tokens": tokens, "dtype": "uint16", "documents": 10}
    manifest["tokenizer"] = {"sha256": "x", "vocab_size": 500}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    return str(prefix)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read manifests without the check that the files beside them are whole."""
    monkeypatch.setattr(datasets, "read_manifest", lambda prefix: json.loads(Path(f"{prefix}.json").read_text()))


def arguments(*prefixes: str, **fields: object) -> SimpleNamespace:
    empty = dict.fromkeys(("data_args_path", "train_data_path", "valid_data_path", "test_data_path"))
    more = {"per_split_data_args_path": None, "tokenizer_type": "NullTokenizer", "pipeline_model_parallel_size": 1}
    more |= {"calculate_per_token_loss": False, "loss_on": "target", "dataloader_type": "single"}
    more |= {"pack": False, "context_parallel_size": 1, "micro_batch_size": 2, "expert_model_parallel_size": 1}
    more |= {"moe_token_dispatcher_type": "alltoall", "vocab_size": 500, "split": None, "eval_iters": 100}
    more |= {"skip_train": False, "lpr_coeff": 0.0, "lpr_original_data_path": None}
    return SimpleNamespace(data_path=list(prefixes) or None, **empty, **{**more, **fields})


def test_a_blend_without_weights_gets_the_files_token_counts(tmp_path: Path) -> None:
    """Without weights Megatron reads each file once and then stops with a bare StopIteration."""
    prefixes = [write_manifest(tmp_path / "a", "monolingual", 300), write_manifest(tmp_path / "b", "monolingual", 100)]
    assert datasets._weighted((prefixes, None)) == (prefixes, [300.0, 100.0])
    assert datasets._weighted((prefixes, [0.5, 0.5])) == (prefixes, [0.5, 0.5])
    assert datasets._weighted(None) is None


def test_no_data_is_refused() -> None:
    with pytest.raises(MixMoEError, match="no training data: give --data-path"):
        datasets.data_prefixes(arguments())


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    prefixes = [write_manifest(tmp_path / "a", "monolingual", 300), write_manifest(tmp_path / "b", "parallel", 100)]
    with pytest.raises(MixMoEError, match="mixes monolingual and parallel data"):
        datasets.data_kind(arguments(*prefixes))


def test_parallel_data_sets_the_loader_and_refuses_a_loss_that_scales_the_aux_losses_wrongly(tmp_path: Path) -> None:
    args = arguments(write_manifest(tmp_path / "a", "parallel", 100), pipeline_model_parallel_size=2)
    datasets.configure_data(args)
    assert args.dataloader_type == "external"
    assert datasets.has_variable_lengths(args)
    args.calculate_per_token_loss = True
    with pytest.raises(MixMoEError, match="calculate-per-token-loss"):
        datasets.configure_data(args)
    args.loss_on = "all"
    datasets.configure_data(args)


def test_packing_is_for_parallel_data(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match="--pack is for parallel data"):
        datasets.configure_data(arguments(write_manifest(tmp_path / "a", "monolingual", 100), pack=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"context_parallel_size": 2}, "--pack needs --context-parallel-size 1"),
     ({"pipeline_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}, "needs --micro-batch-size 1")],
)  # fmt: skip
def test_layouts_that_packing_does_not_go_with(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    prefix = write_manifest(tmp_path / "a", "parallel", 100)
    with pytest.raises(MixMoEError, match=message):
        datasets.configure_data(arguments(prefix, pack=True, **fields))
    datasets.configure_data(
        arguments(prefix, pack=True, **{**fields, "context_parallel_size": 1, "micro_batch_size": 1})
    )


@pytest.mark.parametrize("padding", [{"padded_vocab_size": 512}, {"padded_vocab_size": 4096, "tokenizer_type": "x"}])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path: Path, padding: dict[str, object]) -> None:
    """Rows that a layout or a flag adds were never trained: they count for nothing."""
    prefix = write_manifest(tmp_path / "a", "monolingual", 100)
    datasets.data_kind(arguments(prefix, **padding))
    with pytest.raises(MixMoEError, match=r"made .*a has 500 ids but the model's embedding has only 499 rows"):
        datasets.data_kind(arguments(prefix, vocab_size=499, **padding))


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [("monolingual", {}, "--split 969,30,1 leaves no document of .*a .--eval"), ("parallel", {}, "is all for training"),
     ("monolingual", {"split": "100,0,0"}, "--split 100,0,0 leaves no document of .*a .--eval")],
)  # fmt: skip
def test_validation_is_left_out_where_there_is_no_document_for_it(
    tmp_path: Path, kind: str, fields: dict[str, object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(write_manifest(tmp_path / "a", kind, 100), **fields)
    datasets.configure_data(args)
    assert args.eval_iters == 0
    assert re.search(f"no validation, and no test: .*{why}", caplog.text)
    with pytest.raises(MixMoEError, match="--skip-train leaves nothing to do"):
        datasets.configure_data(arguments(*args.data_path, skip_train=True, **fields))


def test_validation_stays_where_there_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(write_manifest(tmp_path / "a", "monolingual", 100), split="80,10,10")
    datasets.configure_data(args)
    assert args.eval_iters == 100 and not caplog.text
    with pytest.raises(MixMoEError, match=r"--split 0,1,0 leaves no document of .*a for training\."):
        datasets.configure_data(arguments(*args.data_path, split="0,1,0"))
    with pytest.raises(MixMoEError, match="--dataloader-type cyclic is not supported"):
        datasets.configure_data(arguments(*args.data_path, dataloader_type="cyclic"))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({}, [1600, 44, 16]), ({"global_batch_size": 32, "eval_global_batch_size": 32}, [2400, 84, 16]),
     ({"train_samples": 1000, "global_batch_size": 32}, [1000, 32, 16])],
)  # fmt: skip
def test_samples_that_a_run_still_needs(fields: dict[str, object], wanted: list[int]) -> None:
    """Half of 100 steps are done, with batches of 16; validation took 20 samples."""
    values = {"skip_train": False, "step_batch_size_schedule": None, "train_samples": None, "train_iters": 100}
    values |= {"iteration": 50, "consumed_train_samples": 800, "consumed_valid_samples": 20, "global_batch_size": 16}
    values |= {"eval_interval": 50, "eval_iters": 1, "eval_global_batch_size": 12}
    args = SimpleNamespace(**{**values, **fields})
    assert datasets._samples_to_the_end(args, [1000, 1, 16]) == wanted
    assert args.train_iters == (56 if "train_samples" in fields else 100)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("gpu", "layout", "widths"),
    [(False, (1, 1), [*range(1, 161)]), (False, (2, 2), [*range(8, 161, 8)]),
     (True, (1, 1), [*range(16, 161, 16)]), (True, (4, 4), [*range(32, 161, 32)]), (True, (5, 1), [80, 160])],
)  # fmt: skip
def test_a_gpu_sees_few_widths(
    monkeypatch: pytest.MonkeyPatch, pack: bool, gpu: bool, layout: tuple[int, int], widths: list[int]
) -> None:
    """Transformer Engine plans attention anew for each. All can be split by TP (with SP) and CP, none is too long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(datasets, "open_tokenizer", lambda *_: SimpleNamespace(eos_id=9))
    fields = {"tensor_model_parallel_size": layout[0], "context_parallel_size": layout[1], "micro_batch_size": 1}
    args = arguments(sequence_parallel=True, seq_length=160, tokenizer_model="", pack=pack, **fields)
    collate = datasets._collate_function(args, 1)
    row = np.zeros(160, dtype=np.int64)
    samples = [dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), row[:n]) for n in range(1, 161)]
    batches = [collate([sample])["tokens"] for sample in samples]
    assert sorted({batch.shape[1] for batch in batches}) == widths


def test_a_run_of_the_old_order_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    now = {"phase": "stage1", "order": datasets._ORDER}
    datasets.tell_of_another_order([now, {"phase": "stage0"}], "stage1")
    assert not caplog.text
    datasets.tell_of_another_order([now, {"phase": "stage1"}], "stage1")
    assert "begun by an earlier version" in caplog.text


def test_what_is_of_original_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (write_manifest(tmp_path / name, "monolingual", 100) for name in ("old", "new"))
    monkeypatch.chdir(tmp_path)
    args = arguments(old, new, lpr_coeff=0.1, lpr_original_data_path=["./old"])
    datasets.configure_data(args)
    assert datasets.original_prefixes(args) == (old,)
    assert [entry.get("original") for entry in datasets.training_data(args, "lpr_router")] == [True, None]


@pytest.mark.parametrize(
    ("kind", "coeff", "named", "sentence"),
    [
        ("monolingual", 0.1, ["other"], "--lpr-original-data-path other is none of the --data-path prefixes."),
        ("monolingual", 0.1, None, "--lpr-original-data-path is missing"),
        ("monolingual", 0.0, ["a"], "--lpr-original-data-path goes with --lpr-coeff above 0"),
        ("parallel", 0.1, ["a"], "--lpr-coeff goes with monolingual data"),
    ],
)
def test_wrong_original_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, coeff: float, named: list[str] | None, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "a", kind, 100)
    with pytest.raises(MixMoEError, match=re.escape(sentence)):
        datasets.configure_data(arguments("a", lpr_coeff=coeff, lpr_original_data_path=named))
