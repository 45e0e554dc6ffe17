"""Megatron in this process, on the CPU, without its training loop: process groups, configs, layers, small models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.model.config import MixMoETransformerConfig
from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec
from mixmoe_megatron.model.moe_layer import MixMoELayer
from mixmoe_megatron.model.options import MixMoEOptions

VOCAB_SIZE = 64


def initialize_megatron(**sizes: int) -> None:
    """Start gloo with one process and Megatron's groups (once); seed its random states, clear its logged metrics.

    Args:
        sizes: arguments of `parallel_state.initialize_model_parallel`.
    """
    enable_cpu_mode()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    destroy_moe_metrics_tracker()  # its size is that of the first model it saw


def process_groups() -> ProcessGroupCollection:
    """Return Megatron's process groups."""
    return ProcessGroupCollection.use_mpu_process_groups()


def make_options(**overrides: Any) -> MixMoEOptions:
    """Return options; "preset" chooses the preset that the others override."""
    spread = {"router_init_std": None, **overrides}  # routers that tell tokens apart from the start
    return MixMoEOptions.from_preset(spread.pop("preset", "recommended"), **spread)


def make_config(options: MixMoEOptions, stage: int, **overrides: Any) -> MixMoETransformerConfig:
    """Return a small config: 4 layers, H 24, F 48, 4 heads, 2 KV heads, one MoE layer in two."""
    settings: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "use_cpu_initialization": True, "params_dtype": torch.float32, "pipeline_dtype": torch.float32,
        "normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "bias_activation_fusion": False, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "transformer_impl": "local", "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0, "init_method_std": 0.2, "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False, "persist_layer_norm": False,
    }  # fmt: skip
    settings.update(overrides)
    if "kv_channels" not in settings and settings["hidden_size"] % settings["num_attention_heads"]:
        settings["kv_channels"] = 8
    return MixMoETransformerConfig.build(options, stage, **settings)


def make_layer(config: MixMoETransformerConfig, seed: int = 0) -> MixMoELayer:
    """Return one MoE layer, its router biases random too."""
    torch.manual_seed(seed)
    layer = MixMoELayer(config, pg_collection=process_groups())
    layer.set_layer_number(config.moe_layer_freq.index(1) + 1)
    with torch.no_grad():
        for group in layer.router.group_routers():
            if group.bias is not None:
                group.bias.normal_(std=0.2)
    return layer


def make_model(config: MixMoETransformerConfig, seed: int = 0, spec: Any = None, **kwargs: Any) -> GPTModel:
    """Return a small GPT model of `config`, RoPE, tied embedding unless `kwargs` say otherwise."""
    torch.manual_seed(seed)
    return GPTModel(
        config=config,
        transformer_layer_spec=mixmoe_decoder_block_spec(config) if spec is None else spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=32,
        position_embedding_type="rope",
        **{"share_embeddings_and_output_weights": True, **kwargs},
    )


def model_loss(model: GPTModel, batch_size: int = 2, length: int = 8, seed: int = 1, **kwargs: Any) -> torch.Tensor:
    """Return the mean next-token loss of random tokens (a 0-dim float32 tensor)."""
    tokens = torch.randint(0, VOCAB_SIZE, (batch_size, length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(batch_size, length)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous(), **kwargs)
    return losses.float().mean()


def gradients(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of `loss()` by parameter name; parameters without a gradient are left out."""
    module.zero_grad(set_to_none=True)
    loss().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def fingerprint(chunks: list[Any]) -> dict[str, str]:
    """Return a SHA-256 of each parameter's and buffer's dtype, shape and bits; chunk c's names start with "c/"."""
    result = {}
    for index, chunk in enumerate(chunks):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            result[f"{index}/{name.removeprefix('module.')}"] = digest.hexdigest()
    return result


def saved_bytes(module: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, the module's own parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(saved.values())
