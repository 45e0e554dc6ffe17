"""Which of Megatron's arguments this project does not support, and why: all are refused before anything is built.

What concerns the model alone is refused by `config.check_transformer_config`, for users of Megatron's classes too. All
other layouts of tensor, sequence, expert, expert tensor, pipeline (virtual stages too), context and data parallelism
work; tests/distributed holds them to one process.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import Machine, this_machine
from mixmoe_megatron.model.config import Requirements, check_settings
from mixmoe_megatron.training.datasets import has_variable_lengths

_OWN_DDP = "frozen groups and their checkpoints rest on Megatron's own DDP and distributed optimizer"
_OWN_MODEL = "the model is the one that the checkpoint's metadata describes"
_OWN_ORDER = "each validation takes the next --eval-iters batches of one stream of documents"
_OWN_DATA = "the data are what tools/preprocess_data.py made"

#: Megatron argument -> values that are supported, and why the others are not
_REQUIREMENTS: Requirements = {
    "use_megatron_fsdp": ((False,), _OWN_DDP),
    "use_torch_fsdp2": ((False,), _OWN_DDP),
    "optimizer": (("adam", "sgd"), "Muon and its kin expect matrices, the experts are one stacked weight"),
    "ckpt_format": (("torch_dist",), "every command of this project reads and writes torch_dist checkpoints"),
    "freeze_all_layers": ((False,), "the stage decides what is frozen"),
    "moe_use_upcycling": ((False,), "checkpoints_conversion/hf_to_mixmoe.py upcycles, mixed dense and MoE layers too"),
    "spec": ((None,), "the layers come from mixmoe_megatron.model.layer_specs"),
    "yaml_cfg": ((None,), "the checkpoint's metadata complete the command line"),
    "multi_latent_attention": ((False,), _OWN_MODEL),
    "hybrid_layer_pattern": ((None,), _OWN_MODEL),
    "heterogeneous_layers_config_path": ((None,), _OWN_MODEL),
    "heterogeneous_layers_config_encoded_json": ((None,), _OWN_MODEL),
    "hybrid_context_parallel": ((False,), "a sequence is split evenly over the context-parallel ranks"),
    "reset_attention_mask": ((False,), "attention is causal over the whole sequence, no mask is built"),
    "reset_position_ids": ((False,), "rotary positions count from the start of the sequence"),
    "sft": ((False,), _OWN_DATA),
    "fim_data": ((False,), _OWN_DATA),
    "mock_data": ((False,), _OWN_DATA),
    "full_validation": ((False,), _OWN_ORDER),
    "multiple_validation_sets": ((False,), _OWN_ORDER),
    "phase_transition_iterations": ((None,), "each phase would begin the documents anew"),
    "perform_rl_step": ((False,), "the loss is the cross-entropy of the paper"),
}


def check_layout(args: Any) -> None:
    """Refuse what does not go with Mix-MoE in Megatron's arguments; call before Megatron completes them.

    Args:
        args: the parsed namespace.

    Raises:
        MixMoEError: one sentence with the reason.
    """
    check_settings(args, _REQUIREMENTS)
    if args.mixmoe_stage and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise MixMoEError(
            "--tensor-model-parallel-size > 1 needs --sequence-parallel: without it every tensor-parallel rank would "
            "send all tokens to the experts."
        )
    if args.async_save and args.async_strategy == "nvrx" and not has_nvrx_async_support():
        raise MixMoEError(
            "--async-save uses nvidia-resiliency-ext, which is not installed here: install it, or add "
            "--async-strategy mcore --use-persistent-ckpt-worker."
        )
    _check_virtual_stages(args)
    _check_kernels(args, this_machine())


def _check_kernels(args: Any, machine: Machine) -> None:
    """Refuse what the GPU and its libraries cannot do; they would say so in the first step, or nothing at all."""
    uses_te = machine.transformer_engine is not None and args.transformer_impl == "transformer_engine"
    if args.moe_permute_fusion and machine.transformer_engine is None:
        raise MixMoEError("--moe-permute-fusion needs a GPU and Transformer Engine: leave it out.")
    if args.pack and uses_te and machine.capability < (9, 0) and not machine.flash_attention:
        raise MixMoEError(
            "--pack: below compute capability 9.0 Transformer Engine attends to packed documents by flash-attn alone, "
            "which is not installed: install it, or add --transformer-impl local."
        )
    if args.tp_comm_overlap and has_variable_lengths(args):
        raise MixMoEError(
            "--tp-comm-overlap needs batches of one length, and those of parallel text vary: leave it out here."
        )


def _check_virtual_stages(args: Any) -> None:
    """Megatron asserts it late, when the model is built, and without a word about the flags."""
    names = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    uneven = any(getattr(args, name) is not None for name in names)
    uneven |= args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split
    virtual, pipeline = args.num_virtual_stages_per_pipeline_rank, args.pipeline_model_parallel_size
    if virtual and not uneven and args.num_layers % (pipeline * virtual):
        raise MixMoEError(
            f"num_layers={args.num_layers} is not divisible by pipeline_model_parallel_size={pipeline} times "
            f"num_virtual_stages_per_pipeline_rank={virtual}: choose others, or say --pipeline-model-parallel-layout."
        )
