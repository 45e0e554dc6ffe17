"""Megatron-Bridge's AutoBridge takes exported Mix-MoE models to Megatron as our commands do, and back bit by bit.

On a CPU, where Transformer Engine's modules are made but do not run: weights, not logits. `make test-bridge`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.helpers.conversion import MEGATRON_ROPE, assert_bit_equal, load_weights_of, run_conversion
from tests.helpers.forked import run_job
from tests.helpers.tiny_hf import tiny_mixmoe, tiny_tokenizer
from tests.helpers.training import checkpoint_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="needs Megatron-Bridge: `make test-bridge` installs it"
)

MODELS = {"llama1": ("llama", 1), "llama2": ("llama", 2), "qwen1": ("qwen2", 1), "qwen2": ("qwen2", 2)}
ROPE = {"llama": {"rope_theta": MEGATRON_ROPE["rope_theta"], **MEGATRON_ROPE["rope_scaling"]}, "qwen2": None}
LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "ETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "EP2 on torch": {
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "transformer_impl": "local",
    },
    "PP2": {"pipeline_model_parallel_size": 2},
}
CASES = [(model, "one process") for model in MODELS] + [
    (model, layout) for model in ("llama2", "qwen2") for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, what hf_to_mixmoe.py makes of them in MODEL/megatron, and AutoBridge's results in MODEL/LAYOUT."""
    directory = tmp_path_factory.mktemp("bridge")
    for name, (family, stage) in MODELS.items():
        # 505 rows: tensor parallelism pads them.
        model = tiny_mixmoe(family, stage, tie_word_embeddings=stage == 2, vocab_size=505, rope_parameters=ROPE[family])
        model.save_pretrained(directory / name / "hf")
        tiny_tokenizer(directory / name / "hf")
        words = ("--hf-dir", directory / name / "hf", "--output-dir", directory / name / "megatron")
        assert run_conversion("hf_to_mixmoe", *words) == 0
    for processes in (1, 2):
        jobs = [
            [str(directory / model / "hf"), str(directory / model / layout), LAYOUTS.get(layout, {})]
            for model, layout in CASES
            if (layout in LAYOUTS) == (processes == 2)
        ]
        (directory / "jobs.json").write_text(json.dumps(jobs))
        run_job(["tests/bridge/convert.py", str(directory / "jobs.json")], processes, directory / f"logs{processes}")
    return directory


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_import_gives_the_weights_of_our_command(world: Path, model: str, layout: str) -> None:
    expected = checkpoint_tensors(world / model / "megatron")
    actual = checkpoint_tensors(world / model / layout / "loaded")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # Tensor parallelism pads the vocabulary to another size.
        assert torch.equal(actual[name][: len(tensor)], tensor), name
        assert not actual[name][len(tensor) :].any()


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_stage_says_what_trains(world: Path, model: str, layout: str) -> None:
    group = ("LM", "MT")[MODELS[model][1] - 1]
    trained = [json.loads(file.read_text()) for file in (world / model / layout).glob("trained_*.json")]
    assert trained == [[f"{group} experts", f"{group} routers"]] * (2 if layout in LAYOUTS else 1)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_export_is_bit_equal(world: Path, model: str, layout: str) -> None:
    """All but the routers are what was loaded; these are folded with the weights that were drawn in between."""
    source = load_weights_of(world / model / "hf")
    exported = load_weights_of(world / model / layout / "hf")
    assert_bit_equal(
        {name: tensor for name, tensor in exported.items() if ".router.weight" not in name},
        {name: tensor for name, tensor in source.items() if ".router.weight" not in name},
    )


@pytest.mark.parametrize("model", MODELS)
def test_routers_are_folded_as_by_our_command(world: Path, tmp_path: Path, model: str) -> None:
    checkpoint = world / model / "one process" / "megatron"
    for name in ("mixmoe_metadata.json", "tokenizer"):
        (checkpoint / name).symlink_to(world / model / "megatron" / name)
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "hf") == 0
    expected, source = load_weights_of(tmp_path / "hf"), load_weights_of(world / model / "hf")
    layouts = [layout for case, layout in CASES if case == model]
    for layout in layouts:
        assert_bit_equal(load_weights_of(world / model / layout / "hf"), expected)
    assert not torch.equal(*(w["model.layers.1.mlp.router.weight"] for w in (expected, source)))
