"""What Megatron offers and Mix-MoE does not support is refused before anything is built: one sentence, the reason."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixmoe_megatron.checkpoint.metadata import Metadata, write_metadata
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import Machine
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model import config
from mixmoe_megatron.model.config import check_settings
from mixmoe_megatron.training import refusals

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 64,
}  # fmt: skip
MODEL = {**megatron_args_from_hf(CONFIG), "make_vocab_size_divisible_by": 16}
TP2 = "--tensor-model-parallel-size 2 "
PP2 = "--pipeline-model-parallel-size 2 "

#: flags of a job of eight processes -> words of the sentence
REFUSED = {
    "--use-megatron-fsdp": "rest on Megatron's own DDP",
    "--use-torch-fsdp2": "rest on Megatron's own DDP",
    "--optimizer muon": "Muon and its kin",
    "--ckpt-format torch": "torch_dist checkpoints",
    "--freeze-all-layers": "the stage decides what is frozen",
    "--moe-use-upcycling": "hf_to_mixmoe.py upcycles",
    "--spec megatron.core.models.gpt.gpt_layer_specs x": "the layers come from mixmoe_megatron.model.layer_specs",
    "--hybrid-layer-pattern M*M*": "the checkpoint's metadata describes",
    "--reset-attention-mask": "no mask is built",
    "--reset-position-ids": "rotary positions",
    "--sft": "tools/preprocess_data.py made",
    "--mock-data": "tools/preprocess_data.py made",
    TP2: "needs --sequence-parallel",
    "--moe-router-fusion": "the fused router knows no expert groups",
    "--moe-expert-capacity-factor 1.5": "Mix-MoE drops no token",
    "--moe-shared-expert-intermediate-size 64": "contradicts the Mix-MoE options, which give None",
    "--moe-shared-expert-overlap": "runs before the others",
    "--moe-router-enable-expert-bias": "balance is kept by the aux loss",
    "--moe-z-loss-coeff 0.1": "the paper has no z-loss",
    "--moe-router-load-balancing-type sinkhorn": "one aux loss per group",
    "--moe-router-dtype fp64": "the routers compute in float32",
    "--moe-input-jitter-eps 0.1": "the routers take no noise",
    "--moe-latent-size 16": "the full hidden size",
    "--mtp-num-layers 1": "multi-token prediction is not part of Mix-MoE",
    "--glu-linear-offset 1.0": "experts compute what the FFN did",
    "--multi-latent-attention": "the checkpoint's metadata describes",
    "--use-mup": "a pretrained model",
    "--expert-model-parallel-size 8": "num_experts_per_group=4 is not divisible by expert_model_parallel_size=8",
    "--pipeline-model-parallel-size 8": "Megatron refuses these arguments: ",
    PP2 + "--num-virtual-stages-per-pipeline-rank 3": "num_layers=4 is not divisible by",
    "--cuda-graph-impl local": "cuda_graph_impl='local' does not go with Mix-MoE: the frozen layers run ahead",
    "--overlap-dispatch-backward-with-experts-wgrad": "does not go with Mix-MoE: Megatron-FSDP alone adds",
    "--async-save": "add --async-strategy mcore --use-persistent-ckpt-worker",
    "--recompute-granularity full": "Megatron refuses these arguments: ",
    "--tensor-model-parallel-size 8 --sequence-parallel": "Megatron refuses these arguments: num_attention_heads",
}


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The directory of an upcycled checkpoint, its metadata alone."""
    write_metadata(tmp_path, Metadata(PHASES["upcycled"], config.MixMoEOptions(moe_every=2).to_dict(), MODEL, CONFIG))
    return tmp_path


def parse(parent: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the arguments of one of eight processes, as the training command parses them."""
    enable_cpu_mode()
    from mixmoe_megatron.training.arguments import parse_arguments

    line = f"--mixmoe-stage 1 --init-from {parent} --seq-length 32 --micro-batch-size 1 --global-batch-size 8 "
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    return parse_arguments((line + "--lr 1e-4 --train-iters 10 " + flags).split())[0]


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_at_start(parent: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmoe_megatron.training.run import checked_config

    with pytest.raises(MixMoEError) as error:
        checked_config(parse(parent, flags, monkeypatch))
    assert REFUSED[flags] in str(error.value)
    assert "\n" not in str(error.value)


A100 = Machine("A100", (8, 0), "2.9.0", fused_wgrad=True, flash_attention=False, compiler=True)
H100 = replace(A100, gpu="H100", capability=(9, 0))
NO_TE = replace(A100, transformer_engine=None)


@pytest.mark.parametrize(
    ("flags", "there", "message"),
    [
        ({"pack": True}, A100, "flash-attn alone, which is not installed: install it, or add --transformer-impl local"),
        ({"pack": True}, replace(A100, flash_attention=True), None),
        ({"pack": True}, H100, None),
        ({"pack": True}, NO_TE, None),
        ({"pack": True, "transformer_impl": "local"}, A100, None),
        ({"moe_permute_fusion": True}, NO_TE, "--moe-permute-fusion needs a GPU and Transformer Engine"),
        ({"moe_permute_fusion": True}, Machine(), "--moe-permute-fusion needs a GPU and Transformer Engine"),
        ({"moe_permute_fusion": True}, H100, None),
        (
            {"tp_comm_overlap": True, "dataloader_type": "external"},
            H100,
            "batches of one length, and those of parallel",
        ),
        ({"tp_comm_overlap": True}, H100, None),
    ],
)
def test_what_a_gpu_and_its_libraries_cannot_do(flags: dict[str, Any], there: Machine, message: str | None) -> None:
    args = {
        "pack": False, "moe_permute_fusion": False, "tp_comm_overlap": False, "dataloader_type": "single",
        "transformer_impl": "transformer_engine", "expert_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "moe_token_dispatcher_type": "alltoall",
    }  # fmt: skip
    with nullcontext() if message is None else pytest.raises(MixMoEError, match=message):
        refusals._check_kernels(SimpleNamespace(**(args | flags)), there)


@pytest.mark.parametrize("flags", ["", TP2 + "--sequence-parallel " + PP2, "--context-parallel-size 2"])
def test_accepted(parent: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmoe_megatron.training.run import checked_config

    assert checked_config(parse(parent, flags, monkeypatch)).model.transformer.mixmoe_stage == 1


@pytest.mark.parametrize("table", [config._REQUIRED_SETTINGS, refusals._REQUIREMENTS], ids=["config", "arguments"])
def test_each_entry_refuses_and_names_its_reason(table: config.Requirements) -> None:
    for name, (allowed, why) in table.items():
        check_settings(SimpleNamespace(**{name: allowed[0]}), table)
        with pytest.raises(MixMoEError, match=f"^{name}='surprise' does not go with Mix-MoE: ") as error:
            check_settings(SimpleNamespace(**{name: "surprise"}), table)
        assert str(error.value).endswith(f": {why}.")


def test_each_entry_is_something_that_megatron_has(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that Megatron renames would pass unseen."""
    assert set(config._REQUIRED_SETTINGS) <= {field.name for field in fields(config.MixMoETransformerConfig)}
    assert set(refusals._REQUIREMENTS) <= set(vars(parse(parent, "", monkeypatch)))
