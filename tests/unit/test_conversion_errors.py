"""Broken and hostile input to the conversion commands: exit status 2, one sentence, nothing left behind."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixmoe_megatron.methods.registry import PHASES
from tests.helpers.conversion import assert_bit_equal, base_fields, load_weights_of, run_conversion
from tests.helpers.damage import (
    INDEX,
    SHARD,
    WEIGHTS,
    Damage,
    Q,
    adapter_alone,
    config,
    dangling,
    doubled,
    edit_embedding,
    edit_entries,
    edit_places,
    file,
    first_entry,
    header,
    index,
    linked_out,
    many_layers,
    metadata_fields,
    moved_out,
    nothing,
    only_pickled,
    poison,
    poison_tensors,
    put_nan,
    raw_metadata,
    swap,
    weights,
    without_axes,
)
from tests.helpers.tiny_hf import save_tiny_dense, tiny_mixmoe


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face dense (one file, several files) and Mix-MoE directories, and a dense and an upcycled checkpoint."""
    root = tmp_path_factory.mktemp("originals")
    model = save_tiny_dense(root / "dense", "llama", tokenizer=None, **base_fields("llama"))
    model.save_pretrained(root / "sharded", max_shard_size="60KB")
    tiny_mixmoe("llama", 1, **base_fields("llama")).save_pretrained(root / "mixmoe")
    for name, flags in (("dense_checkpoint", ["--dense"]), ("upcycled", [])):
        assert run_conversion("hf_to_mixmoe", "--hf-dir", root / "dense", "--output-dir", root / name, *flags) == 0
    return root


NORM = "model.layers.1.input_layernorm.weight"
NOT_WHOLE = "not a whole safetensors file"
#: case -> (directory, damage, flags, words of the sentence)
IMPORT_CASES: dict[str, tuple[str, Damage, list[str], str]] = {
    "no directory": ("dense", shutil.rmtree, [], "no config.json"),
    "config is no JSON": ("dense", file("config.json", lambda d: d[:-9]), [], "not valid JSON"),
    "no weights": ("dense", file(WEIGHTS, None), [], f"neither {WEIGHTS}"),
    "truncated": ("dense", file(WEIGHTS, lambda d: d[:-100]), [], NOT_WHOLE),
    "trailing bytes": ("dense", file(WEIGHTS, lambda d: d + b"x" * 100), [], NOT_WHOLE),
    "empty file": ("dense", file(WEIGHTS, lambda d: b""), [], NOT_WHOLE),
    "no header": ("dense", file(WEIGHTS, lambda d: b"\xff" * 200), [], NOT_WHOLE),
    "huge header": ("dense", file(WEIGHTS, lambda d: (1 << 62).to_bytes(8, "little") + d[8:]), [], NOT_WHOLE),
    "offsets overlap": ("dense", header(lambda h: first_entry(h).update(data_offsets=[0, 8])), [], NOT_WHOLE),
    "offsets beyond": ("dense", header(lambda h: first_entry(h).update(data_offsets=[0, 1 << 40])), [], NOT_WHOLE),
    "negative shape": ("dense", header(lambda h: first_entry(h).update(shape=[-1, 4])), [], NOT_WHOLE),
    "unknown dtype": ("dense", header(lambda h: first_entry(h).update(dtype="Q4")), [], NOT_WHOLE),
    "a name twice": ("dense", header(text=doubled), [], NOT_WHOLE),
    "a link out": ("dense", linked_out(WEIGHTS), [], "link to a file outside"),
    "a tokenizer link out": ("dense", linked_out("tokenizer.json"), [], "link to a file outside"),
    "an index link out": ("sharded", linked_out(INDEX), [], "link to a file outside"),
    "how to follow links": ("dense", linked_out("config.json"), [], "cp -rL"),
    "weights link to nothing": ("dense", dangling(WEIGHTS), [], f"{WEIGHTS} is a link to nowhere, which is missing"),
    "config link to nothing": ("dense", dangling("config.json"), [], "config.json is a link to nowhere, which is mis"),
    "tokenizer link to nothing": ("dense", dangling("tokenizer.json"), [], "tokenizer.json is a link to nowhere"),
    "a shard link to nothing": ("sharded", lambda d: dangling(sorted(d.glob("*.safetensors"))[1].name)(d), [],
                                "is a link to nowhere, which is missing"),
    "an adapter alone": ("dense", adapter_alone, [], "merge it into its base with peft"),
    "an adapter beside": ("dense", file("adapter_config.json", lambda d: b"{}"), [], "remove adapter_config.json"),
    "a variant": ("dense", lambda d: (d / WEIGHTS).rename(d / "model.fp16.safetensors"), [],
                  "but model.fp16.safetensors: rename it"),
    "a damaged single file beside an index": ("sharded", file(WEIGHTS, lambda d: b"x"), [], NOT_WHOLE),
    "pickled": ("dense", only_pickled, [], "a pickle can run any code"),
    "truncated shard": ("sharded", lambda d: file(sorted(d.glob("*.safetensors"))[1].name, lambda b: b[:-1])(d), [],
                        NOT_WHOLE),
    "missing shard": ("sharded", lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), [], "which is missing"),
    "traversal": ("sharded", moved_out(lambda path: f"../{path.name}"), [], "not a file of this directory"),
    "absolute path": ("sharded", moved_out(str), [], "not a file of this directory"),
    "long name in the index": ("sharded", index(lambda w, d: w.update(dict.fromkeys(w, "x" * 300))), [], "is missing"),
    "nested index": ("sharded", file(INDEX, lambda d: b"[" * 100_000), [], "not a safetensors index"),
    "nested config": ("dense", file("config.json", lambda d: b"[" * 100_000), [], "not valid JSON"),
    "senseless architecture": ("dense", config(architectures="Llama"), [], "architectures is of the wrong type"),
    "numbers as architectures": ("dense", config(architectures=[3]), [], "architecture 3 is not supported"),
    "endless layers": ("dense", config(num_hidden_layers=1 << 40), [], "num_hidden_layers must be"),
    "senseless theta": ("dense", config(rope_theta=[500000.0]), [], "rope_theta is of the wrong type"),
    "senseless deviation": ("dense", config(initializer_range="x"), [], "initializer_range is of the wrong type"),
    "senseless layer types": ("dense", config(layer_types=3), [], "layer_types is of the wrong type"),
    "index is no JSON": ("sharded", file(INDEX, lambda d: d[:-9]), [], "not a safetensors index"),
    "index lists too much": ("sharded", index(lambda w, d: w.update(x=w[Q])), [], "disagree about x"),
    "index lists too little": ("sharded", index(lambda w, d: w.pop(Q)), [], f"disagree about {Q}"),
    "missing key": ("dense", weights(lambda t: t.pop(Q)), [], f"lack {Q}"),
    "unused key": ("dense", weights(lambda t: t.update(x=torch.ones(1))), [], "no mapping uses: x"),
    "dtype": ("dense", weights(lambda t: t.update({Q: t[Q].to(torch.int8)})), [], "dtype int8"),
    "two dtypes": ("dense", weights(lambda t: t.update({Q: t[Q].bfloat16()})), [],
                   "differ in dtype: bfloat16, float32; convert with --dtype fp32"),
    "two dtypes in layers": ("dense", weights(lambda t: t.update({NORM: t[NORM].bfloat16()})), ["--dense"],
                             "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight belong together but"),
    "misshapen": ("dense", weights(swap), [], f"{Q} has shape [16, 32]"),
    "NaN": ("dense", weights(put_nan), ["--check-finite"], f"{Q} holds values that are NaN"),
    "architecture": ("dense", config(architectures=["GPT2LMHeadModel"]), [], "GPT2LMHeadModel is not supported"),
    "bias": ("dense", config(attention_bias=True), [], "attention_bias"),
    "softcap": ("dense", config(final_logit_softcapping=30.0), [], "final_logit_softcapping"),
    "heads": ("dense", config(num_key_value_heads=4), [], "k_proj.weight has shape"),
    "vocabulary": ("dense", config(vocab_size=500), [], "model.embed_tokens.weight has shape"),
    "RoPE": ("dense", config(rope_theta=3.0, rope_parameters={"rope_theta": 4.0}), [], "two values of rope_theta"),
    "too many layers": ("dense", config(num_hidden_layers=5), [], "the weights lack model.layers.4"),
    "too few layers": ("dense", config(num_hidden_layers=3), ["--dense"], "no mapping uses: model.layers.3"),
    "untied output": ("dense", config(tie_word_embeddings=True), [], "differs from model.embed_tokens"),
    "not divisible": ("dense", nothing, ["--num-experts-per-group", "3"], "not divisible by num_experts_per_group=3"),
    "bad option": ("dense", nothing, ["--spectral-transform", "wavelet"], "spectral_transform must be one of"),
    "senseless number": ("dense", nothing, ["--spectral-scale", "x"], "spectral_scale must be a number"),
    "senseless truth": ("dense", nothing, ["--router-bias", "maybe"], "router_bias must be true or false"),
    "no MoE layer": ("dense", nothing, ["--moe-every", "9"], "no MoE layer in a model of 4 layers: at most 4 goes"),
    "option of a dense": ("dense", nothing, ["--dense", "--moe-every", "2"], "leave out --moe-every"),
    "option of a Mix-MoE": ("mixmoe", nothing, ["--preset", "paper"], "leave out --preset"),
    "Mix-MoE kept dense": ("mixmoe", nothing, ["--dense"], "does not go with a Mix-MoE model"),
    "Mix-MoE stage": ("mixmoe", config(stage=2, num_experts=8, num_experts_per_tok=2), [], "has shape"),
    "Mix-MoE bad stage": ("mixmoe", config(stage=3), [], "stage must be 1 or 2"),
}  # fmt: skip
TRACKER = "latest_checkpointed_iteration.txt"
EXPORT_CASES: dict[str, tuple[str, Damage, list[str], str]] = {
    "no directory": ("upcycled", shutil.rmtree, [], "no mixmoe_metadata.json"),
    "no tracker": ("upcycled", file(TRACKER, None), [], "saving was interrupted"),
    "bad tracker": ("upcycled", file(TRACKER, lambda d: b"x"), [], "expected a number"),
    "binary tracker": ("upcycled", file(TRACKER, lambda d: b"\xff\xfe"), [], "expected a number"),
    "tracker of no iteration": ("upcycled", file(TRACKER, lambda d: b"12"), [], "iter_0000012 does not exist"),
    "no iteration": ("upcycled", nothing, ["--iteration", "7"], "iter_0000007 does not exist"),
    "no .metadata": ("upcycled", file("release/.metadata", None), [], ".metadata is missing"),
    "truncated .metadata": ("upcycled", file("release/.metadata", lambda d: d[:-100]), [], "cannot be read"),
    "empty .metadata": ("upcycled", file("release/.metadata", lambda d: b""), [], "cannot be read"),
    "another .metadata": ("upcycled", file("release/.metadata", lambda d: pickle.dumps([1])), [], "it holds a list"),
    "poisoned .metadata": ("upcycled", poison, [], "not allowed"),
    "place outside": ("upcycled", edit_places(lambda p: setattr(p, "relative_path", "../../x")), [], "not a file of"),
    "negative place": ("upcycled", edit_places(lambda p: setattr(p, "offset", -8)), [], "is truncated"),
    "shifted places": ("upcycled", edit_places(lambda p: setattr(p, "offset", 0)), [], "cannot be read"),
    "no shard": ("upcycled", file(SHARD, None), [], "lacks __0_0.distcp, which holds"),
    "truncated shard": ("upcycled", file(SHARD, lambda d: d[:-100]), [], "is truncated: it ends before"),
    "damaged shard": ("upcycled", file(SHARD, lambda d: b"x" * len(d)), [], "cannot be read"),
    "poisoned shard": ("upcycled", poison_tensors, [], "cannot be read"),
    "stage 2 of stage 1": ("upcycled", metadata_fields(phase=PHASES["stage2"]), [], "hold LM experts only"),
    "dense of Mix-MoE": ("upcycled", metadata_fields(phase=PHASES["dense"], options=None), [], "hold LM experts only"),
    "long tracker": ("upcycled", file(TRACKER, lambda d: b"1" * 5000), [], "expected a number"),
    "no size": ("upcycled", edit_embedding(lambda e: delattr(e, "size")), [], "contradicts itself"),
    "no properties": ("upcycled", edit_embedding(lambda e: setattr(e, "properties", e.size)), [], "contradicts itself"),
    "part of fewer axes": (
        "upcycled", edit_embedding(lambda e: setattr(e.chunks[0], "sizes", e.size[:1])), [], "contradicts itself"
    ),
    "part without sizes": (
        "upcycled", edit_embedding(lambda e: delattr(e.chunks[0], "sizes")), [], "contradicts itself"
    ),
    "no part": ("upcycled", edit_embedding(lambda e: e.chunks.clear()), [], "does not hold all of embedding."),
    "no place": ("upcycled", edit_entries(lambda m: m.storage_data.popitem()), [], "contradicts itself"),
    "endless place": ("upcycled", edit_places(lambda p: setattr(p, "offset", float("inf"))), [], "cannot be read"),
    "scalar embedding": ("upcycled", edit_embedding(without_axes), [], "contradicts itself"),
    "endless layers": ("dense_checkpoint", edit_entries(many_layers), [], "1099511627776 layers"),
    "layers": (
        "dense_checkpoint",
        metadata_fields(megatron_args={"num_layers": 5}, hf_config={"num_hidden_layers": 5}), [],
        "lack decoder.layers.4",
    ),
    "argument lost": (
        "upcycled", raw_metadata(lambda m: m["megatron_args"].pop("kv_channels")), [], "kv_channels is None, but"
    ),
    "argument is text": (
        "upcycled", raw_metadata(lambda m: m["megatron_args"].update(num_layers="4")), [], "num_layers is '4', but"
    ),
    "no arguments": ("upcycled", raw_metadata(lambda m: m.update(megatron_args=[])), [], "megatron_args is of"),
    "no config": ("upcycled", raw_metadata(lambda m: m.update(hf_config=[])), [], "hf_config is of the wrong"),
    "no options": ("upcycled", raw_metadata(lambda m: m.update(options=[])), [], "options is of the wrong"),
    "no versions": ("upcycled", raw_metadata(lambda m: m.update(versions=[])), [], "versions is of the wrong"),
    "senseless parent": ("upcycled", raw_metadata(lambda m: m.update(parent="x")), [], "parent is of the wrong"),
    "parent of no phase": ("upcycled", raw_metadata(lambda m: m["parent"].pop("phase")), [], "parent lacks phase"),
    "senseless data": ("upcycled", raw_metadata(lambda m: m.update(data=["x"])), [], "data must be a list of objects"),
    "nested metadata": (
        "upcycled", file("mixmoe_metadata.json", lambda d: b"[" * 100_000), [], "is not valid JSON"
    ),
    "contradiction": (
        "dense_checkpoint", metadata_fields(megatron_args={"norm_epsilon": 0.5}), [], "norm_epsilon is 0.5"
    ),
    "small vocabulary": (
        "dense_checkpoint",
        metadata_fields(megatron_args={"vocab_size": 600}, hf_config={"vocab_size": 600}), [],
        "fewer than the vocabulary",
    ),
    "bad size": ("upcycled", nothing, ["--max-shard-size", "big"], "not a size"),
}  # fmt: skip


def refuse(command: str, source: Path, tmp_path: Path, flags: list[str]) -> int:
    given = "--hf-dir" if command == "hf_to_mixmoe" else "--checkpoint-dir"
    return run_conversion(command, given, source, "--output-dir", tmp_path / "out", *flags)


def assert_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and not shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("case", IMPORT_CASES)
def test_import(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    origin, damage, flags, message = IMPORT_CASES[case]
    source = tmp_path / "in" / "hf"
    shutil.copytree(originals / origin, source)
    damage(source)
    assert refuse("hf_to_mixmoe", source, tmp_path, flags) == 2
    assert_refused(tmp_path, capsys, message)


@pytest.mark.parametrize("case", EXPORT_CASES)
def test_export(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    origin, damage, flags, message = EXPORT_CASES[case]
    source = tmp_path / "in" / "m"
    shutil.copytree(originals / origin, source)
    damage(source)
    assert refuse("mixmoe_to_hf", source, tmp_path, flags) == 2
    assert_refused(tmp_path, capsys, message)


COMMANDS = {"hf_to_mixmoe": "dense", "mixmoe_to_hf": "upcycled"}


@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A limit on the size of files fails in the middle of the weights, as a full disk does."""
    (tmp_path / "in").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        status = refuse(command, originals / COMMANDS[command], tmp_path, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert_refused(tmp_path, capsys, "cannot be written")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "in").mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert refuse(command, originals / COMMANDS[command], tmp_path, []) == 2
    assert_refused(tmp_path, capsys, "0.0 GB free")


@pytest.mark.parametrize("command", COMMANDS)
def test_existing_output_is_kept_unless_forced(originals: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    source = originals / COMMANDS[command]
    assert refuse(command, source, tmp_path, []) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert refuse(command, source, tmp_path, ["--force"]) == 0
    assert not (tmp_path / "out" / "precious").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["plain", "subfolder", "blobs on another disk"])
def test_links_of_a_hub_cache_are_followed(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    repository, disk = tmp_path / "models--x", tmp_path / "disk"
    snapshot = repository / "snapshots" / "abc" / ("sub" if case == "subfolder" else "")
    snapshot.mkdir(parents=True)
    blobs = repository / "blobs"
    if case == "blobs on another disk":
        disk.mkdir()
        blobs.symlink_to(disk)
    shutil.copytree(originals / "dense", blobs, dirs_exist_ok=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", snapshot, "--output-dir", tmp_path / "out") == 0
    if case == "plain":  # the cache's own folder is no model, but holds one
        assert run_conversion("hf_to_mixmoe", "--hf-dir", repository, "--output-dir", tmp_path / "x") == 2
        assert f"not a Hugging Face model directory; {snapshot} is one" in capsys.readouterr().err


@pytest.mark.parametrize("old", ["whole", "without its shards", "no JSON"])
def test_the_single_file_comes_before_an_index(originals: Path, tmp_path: Path, old: str) -> None:
    """As in transformers, which leaves the index of a model in several files behind when it saves one in a file."""
    directory = tmp_path / "hf"
    shutil.copytree(originals / "dense", directory)
    other = save_tiny_dense(tmp_path / "other", seed=1, tokenizer=None, **base_fields("llama"))
    other.save_pretrained(directory / "old", max_shard_size="60KB")
    for path in (directory / "old").iterdir():
        if path.name == INDEX or (path.suffix == ".safetensors" and old == "whole"):
            path.rename(directory / path.name)
    if old == "no JSON":
        (directory / INDEX).write_text("{")
    loaded = AutoModelForCausalLM.from_pretrained(directory).state_dict() if old == "whole" else {}
    assert run_conversion("hf_to_mixmoe", "--hf-dir", directory, "--output-dir", tmp_path / "m", "--dense") == 0
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "back") == 0
    back = load_weights_of(tmp_path / "back")
    assert_bit_equal(back, load_weights_of(originals / "dense"))
    assert all(torch.equal(back[name], value) for name, value in loaded.items())
