"""Compare a Hugging Face model with a Megatron checkpoint on the same tokens, layer by layer.

Both run in this one process, without tensor, pipeline or expert parallelism, on the GPU if there is one.

Shape legend: B sequences, S tokens, H hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmoe_megatron.checkpoint.health import whole_iteration
from mixmoe_megatron.checkpoint.megatron_checkpoint import NOT_WEIGHTS
from mixmoe_megatron.checkpoint.metadata import Metadata, read_metadata
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.model.config import MixMoETransformerConfig
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import padded_vocab_size


@dataclass(frozen=True)
class Difference:
    """How far the two models are apart at one place.

    Attributes:
        place: `embedding`, `layer 0` ..., `final norm` or `logits`.
        largest: largest absolute difference.
        scale: largest absolute value on the Hugging Face side.
    """

    place: str
    largest: float
    scale: float

    @property
    def relative(self) -> float:
        """The largest difference as a fraction of the largest value."""
        return self.largest / max(self.scale, torch.finfo(torch.float32).tiny)


@contextmanager
def single_process() -> Iterator[None]:
    """Give Megatron a process group of one, unless there is one already."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    enable_cpu_mode()
    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mine = not parallel_state.model_parallel_is_initialized()
    if mine:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        if mine:
            parallel_state.destroy_model_parallel()
        if started:
            torch.distributed.destroy_process_group()


def transformer_fields(megatron_args: dict[str, Any]) -> dict[str, Any]:
    """Return the TransformerConfig fields that follow from the arguments of a dense architecture.

    Args:
        megatron_args: as returned by `hf_config.megatron_args_from_hf`.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = TransformerConfig.__dataclass_fields__
    return {
        **{name: value for name, value in megatron_args.items() if name in known},
        "layernorm_epsilon": megatron_args["norm_epsilon"],
        "gated_linear_unit": megatron_args["swiglu"],
        "activation_func": torch.nn.functional.silu,
    }


def transformer_config(metadata: Metadata, dtype: torch.dtype, **fields: Any) -> MixMoETransformerConfig:
    """Return the Megatron configuration of a checkpoint's model for one process.

    Args:
        metadata: of the checkpoint.
        dtype: of the parameters.
        fields: TransformerConfig fields to add or override.
    """
    options = MixMoEOptions.from_dict((metadata.options or {}) if metadata.phase.groups else {})
    settings: dict[str, Any] = {
        "new_layers": metadata.new_layers,
        **(asdict(metadata.lora) if metadata.lora else {}),
        **transformer_fields(metadata.megatron_args),
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "pipeline_dtype": dtype,
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        **fields,
    }
    return MixMoETransformerConfig.build(options, metadata.phase.stage, **settings)


def build_megatron_model(metadata: Metadata, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Build the checkpoint's model, or this rank's part of it, uninitialised, in evaluation mode.

    Needs Megatron's parallel state, such as that of `single_process`; for another layout, its sizes are among `fields`.

    Args:
        metadata: of the checkpoint.
        dtype: of the parameters.
        fields: TransformerConfig fields to add or override.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec

    args = metadata.megatron_args
    config = transformer_config(metadata, dtype, **fields)
    model = GPTModel(
        config,
        mixmoe_decoder_block_spec(config),
        vocab_size=padded_vocab_size(
            args["vocab_size"], args["make_vocab_size_divisible_by"] * config.tensor_model_parallel_size
        ),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args["rope_scaling_factor"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        parallel_output=False,
    )
    return model.eval()


def load_weights(model: torch.nn.Module, directory: Path) -> None:
    """Load one iteration of a torch_dist checkpoint into a model, every parameter accounted for.

    Args:
        model: from `build_megatron_model`.
        directory: of the iteration.

    Raises:
        MixMoEError: the checkpoint lacks a tensor of the model, or holds one that the model lacks.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    wanted = {"model": model.sharded_state_dict()}  # type: ignore[operator]
    # Megatron calls what the checkpoint has beyond the model "missing", and what it lacks "unexpected".
    state, beyond, lacking = dist_checkpointing.load(wanted, str(directory), strict="return_all")
    if lacking:
        raise MixMoEError(f"{directory} lacks {sorted(lacking)[0]}.")
    if weights := sorted(key for key in beyond if not key.endswith("_extra_state") and not NOT_WEIGHTS.match(key)):
        raise MixMoEError(f"{directory} holds {weights[0]}, which the model has no place for.")
    model.load_state_dict(state["model"])


def _outputs(modules: dict[str, torch.nn.Module], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Run a model and return what its modules gave, by name, and `logits`; float32 on the CPU."""
    found: dict[str, Any] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            hook = module.register_forward_hook(
                lambda _module, _inputs, output, name=name: found.update({name: output})
            )
            stack.callback(hook.remove)
        found["logits"] = run()
    firsts = {name: output[0] if isinstance(output, tuple) else output for name, output in found.items()}
    return {name: output.detach().float().cpu() for name, output in firsts.items()}


def compare_models(hf_model: Any, megatron_model: Any, token_ids: Tensor) -> list[Difference]:
    """Run both models and compare embedding, every layer, final norm and logits, in that order.

    Args:
        hf_model: Llama, Qwen2 or Mix-MoE model for causal language modeling.
        megatron_model: GPTModel on one process; its padded logits are left out.
        token_ids: [B, S] int64.
    """
    core, decoder = hf_model.model, megatron_model.decoder
    names = ["embedding", *(f"layer {i}" for i in range(len(core.layers))), "final norm"]
    hf_modules = dict(zip(names, [core.embed_tokens, *core.layers, core.norm], strict=True))
    mcore_modules = dict(zip(names, [megatron_model.embedding, *decoder.layers, decoder.final_layernorm], strict=True))
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    vocab_size = hf_model.config.vocab_size

    def run_megatron() -> Tensor:
        return megatron_model(token_ids, positions, None)[..., :vocab_size]

    reference = _outputs(hf_modules, lambda: hf_model(input_ids=token_ids, use_cache=False).logits)
    ours = _outputs(mcore_modules, run_megatron)
    ours |= {name: ours[name].transpose(0, 1) for name in names}  # [S, B, H]
    return [
        Difference(name, float((ours[name] - reference[name]).abs().max()), float(reference[name].abs().max()))
        for name in [*names, "logits"]
    ]


def check_parity(
    hf_dir: str, checkpoint_dir: str, text: str | None, tolerance: float, dtype: str, iteration: int | None = None
) -> tuple[list[Difference], Difference | None]:
    """Load both sides and compare them on a text.

    Args:
        hf_dir: Hugging Face directory, dense or exported Mix-MoE.
        checkpoint_dir: checkpoint directory of this project.
        text: None: 64 fixed token ids, for models without a tokenizer.
        tolerance: largest allowed relative difference.
        dtype: `fp32` or `bf16`, of both models.
        iteration: None: the one that the tracker file names.

    Returns:
        All differences, and the first one over the tolerance (None: the models agree).

    Raises:
        MixMoEError: a directory is not what it should be, or the two models differ in kind.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixmoe_megatron.hf import register_auto_classes

    register_auto_classes()
    metadata = read_metadata(checkpoint_dir)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (Path(hf_dir) / "config.json").is_file():
        raise MixMoEError(f"{hf_dir} has no config.json: it is not a Hugging Face model directory.")
    hf_model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch_dtype).eval().to(device)
    if text is None:
        ids = torch.arange(64).remainder(hf_model.config.vocab_size).unsqueeze(0)
    else:
        ids = AutoTokenizer.from_pretrained(hf_dir)(text, return_tensors="pt").input_ids
    with single_process():
        model = build_megatron_model(metadata, torch_dtype)
        load_weights(model, whole_iteration(checkpoint_dir, iteration, flag="--iteration"))
        if model.config.num_layers != hf_model.config.num_hidden_layers:
            raise MixMoEError("the two models differ in their number of layers.")
        differences = compare_models(hf_model, model.to(device), ids.to(device))
    first = next((d for d in differences if not d.relative <= tolerance), None)
    return differences, first
