"""A converted model computes what the original computes: Hugging Face and Megatron logits, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixmoe_megatron.checkpoint.metadata import Metadata, read_metadata
from mixmoe_megatron.conversion import parity
from mixmoe_megatron.conversion.plan import expand
from mixmoe_megatron.hf import register_auto_classes
from mixmoe_megatron.methods.registry import PHASES, STAGES
from mixmoe_megatron.model.extra_state import extra_state_keys
from mixmoe_megatron.model.mapping import TABLES
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import model_sizes
from tests.helpers.conversion import base_fields, run_conversion
from tests.helpers.tiny_hf import save_tiny_dense

TOLERANCE = 1e-5
TOKENS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    register_auto_classes()
    with parity.single_process():
        yield


def assert_parity(hf_dir: Path, model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> None:
    reference = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    for difference in parity.compare_models(reference, model, tokens):
        assert difference.relative <= TOLERANCE, difference


def loaded_model(checkpoint: Path, **fields: Any) -> torch.nn.Module:
    model = parity.build_megatron_model(read_metadata(checkpoint), **fields)
    parity.load_weights(model, checkpoint / "release")
    return model


#: the families, and what sets real models apart: SmolLM2's 9 heads on 3 groups, Mistral Nemo's heads wider than H / 9
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", base_fields("llama")),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "smollm2": ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5,
                          "rope_scaling": None}),
    "NTK by hand": ("llama", {"rope_theta": 26881.44, "rope_scaling": None}),
    "wide heads": ("mistral", {"head_dim": 16, "sliding_window": None}),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense(tmp_path: Path, name: str, tied: bool) -> None:
    family, fields = FAMILIES[name]
    save_tiny_dense(tmp_path / "hf", family, tied, tokenizer=None, **fields)
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--dense") == 0
    assert_parity(tmp_path / "hf", loaded_model(tmp_path / "m"))


def test_llama3_rope_beyond_the_original_context(tmp_path: Path) -> None:
    fields = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16384,
    }
    save_tiny_dense(tmp_path / "hf", "llama", tokenizer=None, **fields, **base_fields("llama"))
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--dense") == 0
    tokens = torch.randint(0, 512, (1, 8192 + 64), generator=torch.Generator().manual_seed(4))
    assert_parity(tmp_path / "hf", loaded_model(tmp_path / "m"), tokens)
    # the test would notice Megatron's default factor
    metadata = read_metadata(tmp_path / "m")
    metadata.megatron_args["rope_scaling_factor"] = 8.0
    wrong = parity.build_megatron_model(metadata)
    parity.load_weights(wrong, tmp_path / "m" / "release")
    with pytest.raises(AssertionError):
        assert_parity(tmp_path / "hf", wrong, tokens)


CASES = [
    ("llama", 1, {}),
    ("mistral", 2, {}),
    ("qwen2", 2, {}),
    ("llama", 2, {"preset": "paper", "topk_per_group": 2}),
    ("llama", 2, {"spectral_transform": "dct", "router_bias": False}),
    ("qwen2", 1, {"spectral_transform": "random", "router_prob_scaling": False}),
    ("llama", 2, {"spectral_transform": "none", "expert_init": "copy", "num_experts_per_group": 2}),
]


@pytest.mark.parametrize(("family", "stage", "options"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_trained_mixmoe(tmp_path: Path, family: str, stage: int, options: dict[str, Any]) -> None:
    """A Megatron model with every parameter random, spectral weights too, saved by Megatron, exported, compared."""
    checkpoint, out = tmp_path / "m", tmp_path / "out"
    save_tiny_dense(tmp_path / "hf", family, True, tokenizer=None, **base_fields(family))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if not isinstance(value, bool)]
    flags += [f"--{name.replace('_', '-')}=false" for name, value in options.items() if value is False]
    assert (
        run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", checkpoint, "--moe-every=2", *flags)
        == 0
    )
    metadata = read_metadata(checkpoint)
    metadata.phase = STAGES[stage]
    model = save_random_model(checkpoint, metadata)
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", out, "--iteration", "3") == 0
    assert_parity(out, model)
    # and back: the folded router computes the same
    assert run_conversion("hf_to_mixmoe", "--hf-dir", out, "--output-dir", tmp_path / "again") == 0
    assert_parity(out, loaded_model(tmp_path / "again"))


def save_random_model(checkpoint: Path, metadata: Metadata) -> torch.nn.Module:
    """Build the model, fill it with noise and save it the way Megatron does, with something like optimizer state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from mixmoe_megatron.checkpoint.metadata import write_metadata

    model = parity.build_megatron_model(metadata)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    directory = checkpoint / "iter_0000003"
    directory.mkdir()
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", torch.zeros(4))},
        "iteration": 3,
    }
    dist_checkpointing.save(state, str(directory))
    write_metadata(checkpoint, metadata)
    return model


@pytest.mark.parametrize("stage", ["dense", "upcycled", "stage2"])
def test_our_keys_are_the_models_keys(tmp_path: Path, stage: str) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None)
    arguments = [
        "--hf-dir",
        tmp_path / "hf",
        "--output-dir",
        tmp_path / "m",
        *(["--dense"] if stage == "dense" else []),
    ]
    assert run_conversion("hf_to_mixmoe", *arguments) == 0
    metadata = read_metadata(tmp_path / "m")
    metadata.phase = PHASES[stage]
    options = None if metadata.options is None else MixMoEOptions.from_dict(metadata.options)
    sizes = model_sizes(metadata.megatron_args, options, metadata.phase.stage)
    ours = {name for unit in expand(TABLES["same"], sizes) for name, _ in unit.megatron}
    if stage == "dense":
        ours = {".".join(part for part in name.split(".") if not part.isdigit()) for name in ours}
    objects, theirs = set(), set()
    for entry in parity.build_megatron_model(metadata).sharded_state_dict().values():
        is_object = entry.key.endswith("_extra_state")
        (objects if is_object else theirs).add(entry.unique_key if is_object else entry.key)
    assert theirs == ours
    assert objects <= set(extra_state_keys(sizes))


@pytest.mark.parametrize("kind", ["dense", "upcycled"])
def test_stock_megatron_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`--load DIR --finetune --use-checkpoint-args`, no other flag, through Megatron's own loading."""
    from megatron.training import arguments, checkpointing, global_vars

    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None)
    flags = ["--dense"] if kind == "dense" else []
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", *flags) == 0
    monkeypatch.setattr("sys.argv", ["x", "--load", str(tmp_path / "m"), "--finetune", "--use-checkpoint-args"])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    args = arguments.parse_args()
    args.use_dist_ckpt = True  # what Megatron's validation makes of the default --ckpt-format
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    checkpointing.load_args_from_checkpoint(args)
    assert (args.num_layers, args.add_qkv_bias, args.padded_vocab_size) == (4, True, 512)
    assert args.num_experts == (None if kind == "dense" else 4)
    expected = loaded_model(tmp_path / "m").state_dict()
    model = parity.build_megatron_model(read_metadata(tmp_path / "m"))
    assert checkpointing.load_checkpoint([model], None, None) == (0, 0)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items() if isinstance(v, torch.Tensor))


def test_check_parity_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2")
    save_tiny_dense(tmp_path / "other", "qwen2", seed=1)
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "hf", "--output-dir", tmp_path / "m", "--dense") == 0
    common = ["--checkpoint-dir", tmp_path / "m", "--text", "Das Haus ist alt."]
    assert run_conversion("check_parity", "--hf-dir", tmp_path / "hf", *common) == 0
    assert "the models agree" in capsys.readouterr().out
    assert run_conversion("check_parity", "--hf-dir", tmp_path / "other", *common) == 1
    assert "differ from embedding on" in capsys.readouterr().out
    assert run_conversion("check_parity", "--hf-dir", tmp_path, *common) == 2
