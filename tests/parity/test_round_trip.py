"""Hugging Face -> Megatron -> Hugging Face is bit-equal, for dense and Mix-MoE models of both families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixmoe_megatron.checkpoint.fingerprint import weights_xxh128
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader
from mixmoe_megatron.checkpoint.metadata import read_metadata, write_metadata
from mixmoe_megatron.conversion.hf_import import open_weights
from tests.helpers.conversion import assert_bit_equal, base_fields, load_weights_of, run_conversion
from tests.helpers.mappings import read_tensor
from tests.helpers.tiny_hf import randomize, save_tiny_dense, tiny_mixmoe, tiny_mixmoe_config


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dense(tmp_path: Path, family: str, tied: bool) -> None:
    hf, checkpoint, back = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "back"
    save_tiny_dense(hf, family, tied, dtype=torch.bfloat16, **base_fields(family))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", hf, "--output-dir", checkpoint, "--dense") == 0
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", back) == 0
    assert_bit_equal(load_weights_of(back), load_weights_of(hf))
    before, after = AutoConfig.from_pretrained(hf).to_dict(), AutoConfig.from_pretrained(back).to_dict()
    assert {k: v for k, v in after.items() if k != "_name_or_path"} == {
        k: v for k, v in before.items() if k != "_name_or_path"
    }
    metadata = read_metadata(checkpoint)
    assert metadata.phase.name == "dense" and metadata.parent == {
        "path": str(hf), "phase": "dense", "weights_xxh128": weights_xxh128(open_weights(hf))
    }  # fmt: skip
    text = "Das Haus ist alt."
    assert AutoTokenizer.from_pretrained(back)(text) == AutoTokenizer.from_pretrained(hf)(text)


@pytest.mark.parametrize(
    ("family", "stage", "fields"),
    [
        ("llama", 1, {"tie_word_embeddings": True}),
        ("llama", 2, {}),
        ("qwen2", 2, {"tie_word_embeddings": True, "router_bias": False, "group_combine": "sum", "expert_scale": 1.0}),
        ("qwen2", 1, {"moe_layers": [0, 1], "topk_per_group": 2, "router_prob_scaling": False}),
        (
            "llama",
            2,
            {"moe_intermediate_size": 64, "num_experts_per_group": 2, "mixmoe": {"spectral_transform": "none"}},
        ),
    ],
    ids=["stage1-tied", "stage2", "qwen2-stage2-tied", "qwen2-stage1-top2", "stage2-copies-no_transform"],
)
def test_mixmoe(tmp_path: Path, family: str, stage: int, fields: dict) -> None:
    hf, checkpoint, back = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "back"
    model = tiny_mixmoe(family, stage, **{**base_fields(family), **fields})
    model.save_pretrained(hf)
    assert run_conversion("hf_to_mixmoe", "--hf-dir", hf, "--output-dir", checkpoint) == 0
    assert (
        run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", back, "--max-shard-size", "40KB")
        == 0
    )
    assert_bit_equal(load_weights_of(back), load_weights_of(hf))
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert read_metadata(checkpoint).phase.name == f"stage{stage}"
    again = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        # not bit-equal: torch may choose another kernel for differently aligned memory
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for name in (
        "base_model_type",
        "moe_layers",
        "stage",
        "expert_scale",
        "group_combine",
        "rope_theta",
        "rope_scaling",
    ):
        assert getattr(again.config, name) == getattr(model.config, name), name


def test_exported_directory_is_complete(tmp_path: Path) -> None:
    hf, checkpoint, out = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "out"
    save_tiny_dense(hf, "llama", **base_fields("llama"))
    (hf / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "LICENSE").write_text("licence of the base")
    assert (
        run_conversion(
            "hf_to_mixmoe", "--hf-dir", hf, "--output-dir", checkpoint, "--preset", "paper", "--moe-every", "2"
        )
        == 0
    )
    arguments = ["--checkpoint-dir", checkpoint, "--output-dir", out, "--base-model", "tiny/llama"]
    assert run_conversion("mixmoe_to_hf", *arguments) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "modeling_mixmoe.py", "configuration_mixmoe.py", "tokenizer.json",
        "LICENSE", "tokenizer.model", "generation_config.json", "chat_template.jinja", "README.md",
        "mixmoe_metadata.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["stage"] == 1 and config["moe_layers"] == [1, 3] and config["expert_scale"] == 1.0
    assert config["mixmoe"]["spectral_norm"] == "backward" and config["auto_map"]["AutoModelForCausalLM"]
    card = (out / "README.md").read_text()
    assert "base_model: tiny/llama" in card and "upcycled" in card and "licence applies" in card
    assert weights_xxh128(open_weights(hf)) in card
    # an upcycled model that comes back is still an upcycled one
    assert run_conversion("hf_to_mixmoe", "--hf-dir", out, "--output-dir", tmp_path / "again") == 0
    before, after = read_metadata(checkpoint), read_metadata(tmp_path / "again")
    assert (after.phase, after.options, after.megatron_args) == (before.phase, before.options, before.megatron_args)


PATHS = ["/ckpt/llama2-7b", "./run: 3 #best", "../base", "~/llama", "C:\\models\\base", "D:/base", "file:///b",
         "runs/7/base", ".", "\\\\server\\base", "here"]  # fmt: skip
NAMES = ["org/name", "Our model: 3 #best", "yes", "1.5", "- x", "naïve | *base* `v1`", "'\"{}[]&!%@", " org/name\n"]


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    save_tiny_dense(root / "hf", "qwen2", tokenizer=None)
    assert run_conversion("hf_to_mixmoe", "--hf-dir", root / "hf", "--output-dir", root / "m", "--dense") == 0
    return root / "m"


@pytest.mark.parametrize("name", PATHS + NAMES)
def test_the_card_names_the_base_but_no_path(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    metadata = read_metadata(dense_checkpoint)
    metadata.hf_config["_name_or_path"] = name
    shutil.copytree(dense_checkpoint, tmp_path / "m")
    write_metadata(tmp_path / "m", metadata)
    words = ["--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "out"]
    assert run_conversion("mixmoe_to_hf", *words) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict().get("base_model") == (None if name in PATHS else name.strip())
    assert ("| base model | not recorded |" in card.text) == (name in PATHS)
    given = run_conversion("mixmoe_to_hf", *words, "--force", f"--base-model={name}")
    assert given == (2 if name in PATHS else 0)


def test_file_names_that_are_no_utf8(dense_checkpoint: Path, tmp_path: Path) -> None:
    metadata = read_metadata(dense_checkpoint)
    metadata.data = [{"phase": "stage1", "prefix": "b\udce4d"}]
    shutil.copytree(dense_checkpoint, tmp_path / "m\udce4")
    write_metadata(tmp_path / "m\udce4", metadata)
    out, back = tmp_path / "o\udce4", tmp_path / "b\udce4"
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "m\udce4", "--output-dir", out) == 0
    assert "udce4" in (out / "README.md").read_text()
    assert run_conversion("hf_to_mixmoe", "--hf-dir", out, "--output-dir", back, "--dense") == 0
    parent = read_metadata(back).parent
    assert parent is not None and parent["path"] == str(out)


def test_transformers_takes_the_carried_generation_config(tmp_path: Path) -> None:
    hf, checkpoint, out = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "out"
    save_tiny_dense(hf, "llama", **base_fields("llama"))
    given = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}
    (hf / "generation_config.json").write_text(json.dumps(given))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", hf, "--output-dir", checkpoint) == 0
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", out) == 0
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = model.generation_config
    assert {name: getattr(found, name) for name in given} == given
    found.validate(strict=True)
    made = model.generate(torch.tensor([[11, 12, 13]]), pad_token_id=0)
    assert made.shape[1] == 10 or int(made[0, -1]) in given["eos_token_id"]  # type: ignore[operator]


def test_upcycling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2")
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = ["--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / name, "--seed", seed]
        assert run_conversion("hf_to_mixmoe", *arguments) == 0
        reader = TorchDistReader(tmp_path / name / "release")
        weights.append({key: read_tensor(reader, key) for key in reader.names()})
    assert_bit_equal(weights[0], weights[1])
    differing = {key for key in weights[0] if not torch.equal(weights[0][key], weights[2][key])}
    assert differing == {f"decoder.layers.3.mlp.router.lm.{kind}" for kind in ("weight", "spectral_weight")}


def test_dtypes(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None)
    arguments = ["--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "half", "--dtype", "bf16"]
    assert run_conversion("hf_to_mixmoe", *arguments) == 0
    reader = TorchDistReader(tmp_path / "half" / "release")
    assert {key for key in reader.names() if reader.dtype(key) == "float32"} == {
        key for key in reader.names() if "router" in key
    }
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "half", "--output-dir", tmp_path / "out") == 0
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).dtype is torch.bfloat16
    arguments = ["--checkpoint-dir", tmp_path / "half", "--output-dir", tmp_path / "wide", "--dtype", "fp32"]
    assert run_conversion("mixmoe_to_hf", *arguments) == 0
    assert {t.dtype for t in load_weights_of(tmp_path / "wide").values()} == {torch.float32}


@pytest.mark.parametrize("upcycled", [True, False], ids=["upcycled", "dense"])
@pytest.mark.parametrize("odd", ["k_proj", "gate_proj", "embed_tokens", "norm"])
def test_tensors_of_several_dtypes_are_cast_to_one(tmp_path: Path, odd: str, upcycled: bool) -> None:
    """They need not agree when --dtype makes them, though Megatron has q, k, v and gate, up in one tensor each."""
    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None, dtype=torch.bfloat16)
    given = load_file(tmp_path / "hf" / "model.safetensors")
    given = {name: value.float() + 1e-5 if odd in name else value for name, value in given.items()}
    save_file(given, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    for flag, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        words = ["--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--dtype", flag, "--force"]
        assert run_conversion("hf_to_mixmoe", *words, *([] if upcycled else ["--dense"])) == 0
        words = ["--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "back", "--force"]
        assert run_conversion("mixmoe_to_hf", *words) == 0
        back = load_weights_of(tmp_path / "back")
        cast = {name: value.to(dtype) for name, value in given.items() if name in back}
        assert_bit_equal({name: back[name] for name in cast}, cast)
        assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]


@pytest.mark.parametrize(
    ("declared", "wide", "dtype"),
    [
        ("bfloat16", ["embed_tokens"], "bfloat16"),
        ("bfloat16", ["embed_tokens", "lm_head", "mlp"], "bfloat16"),
        ("float32", ["norm"], "float32"),
        (None, ["norm"], "bfloat16"),
        ("float16", ["norm"], "bfloat16"),
        ("float32", [], "bfloat16"),
    ],
)
def test_an_export_declares_the_dtype_of_its_base(
    tmp_path: Path, declared: str | None, wide: list[str], dtype: str
) -> None:
    """As long as some weights have it; else that of most of them. Routers, which are always float32, do not count."""
    save_tiny_dense(tmp_path / "hf", "llama", tokenizer=None, dtype=torch.bfloat16, **base_fields("llama"))
    given = load_file(tmp_path / "hf" / "model.safetensors")
    given = {name: value.float() if any(part in name for part in wide) else value for name, value in given.items()}
    save_file(given, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    config = {**json.loads((tmp_path / "hf" / "config.json").read_text()), "dtype": declared}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for flags in ([], ["--dense"]):
        words = ["--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--force", *flags]
        assert run_conversion("hf_to_mixmoe", *words) == 0
        words = ["--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "back", "--force"]
        assert run_conversion("mixmoe_to_hf", *words) == 0
        found = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (found.get("dtype") or found["torch_dtype"]) == dtype


def test_vocabulary_is_padded_and_trimmed(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "hf", "llama", tokenizer=None, vocab_size=509, **base_fields("llama"))
    arguments = [
        "--hf-dir",
        tmp_path / "hf",
        "--output-dir",
        tmp_path / "m",
        "--dense",
        "--make-vocab-size-divisible-by",
        "64",
    ]
    assert run_conversion("hf_to_mixmoe", *arguments) == 0
    assert TorchDistReader(tmp_path / "m" / "release").shape("output_layer.weight") == (512, 32)
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "back") == 0
    assert_bit_equal(load_weights_of(tmp_path / "back"), load_weights_of(tmp_path / "hf"))


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_dense(tmp_path / "hf", "llama", tokenizer=None, **base_fields("llama"))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "decoder.layers.3.mlp.experts.lm_experts.experts.linear_fc1.weight" in shown and "bytes -> " in shown
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("missing", ["model_type", "architectures"])
def test_half_a_name_is_enough(tmp_path: Path, missing: str) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[missing]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m") == 0
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "m", "--output-dir", tmp_path / "out") == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").base_model_type == "qwen2"


def test_config_only_models_come_back_without_metadata(tmp_path: Path) -> None:
    from mixmoe_megatron.hf import MixMoEForCausalLM

    model = MixMoEForCausalLM(tiny_mixmoe_config("qwen2", 2))
    randomize(model)
    model.save_pretrained(tmp_path / "hf")
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m") == 0
    metadata = read_metadata(tmp_path / "m")
    assert (
        metadata.hf_config["architectures"] == ["Qwen2ForCausalLM"] and metadata.options["moe_layer_placement"] == "1,3"
    )


@pytest.mark.parametrize("router", ["copy", "random"])
def test_stage_2_as_a_command(tmp_path: Path, router: str) -> None:
    """The MT group equals the LM group, and with the mean of both the model computes what stage 1 computed."""
    fields = {**base_fields("llama"), "mixmoe": {"mt_router_init": router}}
    stage1 = tiny_mixmoe("llama", 1, **fields)
    stage1.save_pretrained(tmp_path / "hf")
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "stage1") == 0
    words = ["--checkpoint-dir", tmp_path / "stage1", "--output-dir", tmp_path / "stage2"]
    assert run_conversion("add_mt_experts", *words) == 0
    assert (
        run_conversion("add_mt_experts", "--checkpoint-dir", tmp_path / "stage2", "--output-dir", tmp_path / "x") == 2
    )
    reader, metadata = TorchDistReader(tmp_path / "stage2" / "release"), read_metadata(tmp_path / "stage2")
    assert (metadata.phase.name, metadata.parent["phase"]) == ("stage2", "stage1")
    mt = {name for name in reader.names() if ".mt_experts." in name or ".router.mt." in name}
    assert len(mt) == 2 * 5  # two MoE layers: two expert matrices; the router's two weights and bias
    for name in mt:
        lm = read_tensor(reader, name.replace(".mt_experts.", ".lm_experts.").replace(".router.mt.", ".router.lm."))
        assert torch.equal(read_tensor(reader, name), lm) == (router == "copy" or ".router." not in name), name
    assert (
        run_conversion("mixmoe_to_hf", "--checkpoint-dir", tmp_path / "stage2", "--output-dir", tmp_path / "out") == 0
    )
    if router == "copy":
        ids = torch.arange(40).view(2, 20)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, stage1(ids).logits, rtol=1e-5, atol=1e-5)
