"""Megatron -> Hugging Face: a plain Llama or Qwen2 directory for a dense checkpoint, a Mix-MoE one for the others."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.health import whole_iteration
from mixmoe_megatron.checkpoint.hf_files import TOKENIZER_DIR, copy_side_files, model_card, published_name
from mixmoe_megatron.checkpoint.megatron_checkpoint import EMBEDDING, TorchDistReader, vocabulary_rows
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, read_metadata
from mixmoe_megatron.checkpoint.output_dir import check_output_dir, check_space, whole_directory
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.safetensors_io import SINGLE_FILE, SafetensorsReader, write_safetensors
from mixmoe_megatron.checkpoint.tensors import LazyTensor, TensorSource, verify_written
from mixmoe_megatron.cli import whole_file
from mixmoe_megatron.conversion import peft_adapter, qwen2_moe
from mixmoe_megatron.conversion.byte_progress import progress
from mixmoe_megatron.conversion.exported import copy_code, mixmoe_config
from mixmoe_megatron.conversion.hf_config import ADAPTER_FILE, CONFIG_FILE
from mixmoe_megatron.conversion.plan import Target, describe_tensors, expand, plan_tensors
from mixmoe_megatron.conversion.prepared import describe_model
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.methods.registry import method_of
from mixmoe_megatron.model.mapping import LORA_ROWS, TABLES, Row
from mixmoe_megatron.model.sizes import ModelDescription

#: in the names of tensors of a router, and of the gate of a shared expert
_ROUTERS = (".mlp.router.", ".mlp.gate.", ".shared_expert_gate.")


@dataclass(frozen=True)
class ExportRequest:
    """What `mixmoe_to_hf.py` is asked to do.

    Attributes:
        checkpoint_dir: directory with mixmoe_metadata.json.
        output_dir: the Hugging Face directory to make.
        iteration: None: the one that the tracker file names.
        format: transformers' model_type of a model with experts, `mixmoe` or `qwen2_moe`; of one with LoRA `merged` or
            `adapter`; None: as its method has it, and merged.
        dtype: `keep`, `fp32` or `bf16`; the router is always float32.
        max_shard_bytes: of a weight file.
        base_model: name of the dense base model, for the model card.
        check_finite: refuse weights that hold NaN or infinite values.
        force: replace an output directory that has content.
    """

    checkpoint_dir: str
    output_dir: str
    iteration: int | None = None
    format: str | None = None
    dtype: str = "keep"
    max_shard_bytes: int = 5 * 10**9
    base_model: str | None = None
    check_finite: bool = False
    force: bool = False


@dataclass(frozen=True)
class PreparedExport:
    """A checked export: everything but the weights is settled.

    Attributes:
        request: what was asked for.
        model: that the checkpoint holds.
        metadata: of the checkpoint.
        config: the config.json to write, but for its dtype.
        plan: the tensors to write.
    """

    request: ExportRequest
    model: ModelDescription
    metadata: Metadata
    config: dict[str, Any]
    plan: list[LazyTensor]

    @property
    def is_adapter(self) -> bool:
        """Whether a PEFT adapter is written, not a model."""
        return self.request.format == "adapter"

    def describe(self) -> str:
        """Return the plan for --dry-run."""
        return describe_tensors(self.plan, self.request.output_dir)


def prepare_export(request: ExportRequest) -> PreparedExport:
    """Read metadata and check that every tensor of the checkpoint has its place. Writes nothing.

    Raises:
        MixMoEError: anything wrong with the checkpoint or the request.
    """
    check_output_dir(request.output_dir, request.force)
    if request.base_model is not None and published_name(request.base_model) is None:
        raise MixMoEError(
            f"--base-model {request.base_model!r} seems to be a path, which a model card should not tell: give the "
            "model's name, such as organisation/name."
        )
    metadata = read_metadata(request.checkpoint_dir)
    directory = whole_iteration(request.checkpoint_dir, request.iteration, flag="--iteration")
    reader = TorchDistReader(directory)
    rows = vocabulary_rows(reader, directory)
    model = describe_model(metadata, rows)
    if rows < metadata.megatron_args["vocab_size"]:
        raise MixMoEError(
            f"{EMBEDDING} has {rows} rows, fewer than the vocabulary of {metadata.megatron_args['vocab_size']}."
        )
    _check_experts(model, reader)
    target = Target("hf", request.dtype, model.options, check_finite=request.check_finite)
    if model.lora is not None:
        config, plan = _with_lora(request, model, model.lora, reader, target)
    else:
        config, table, source = _form(request, model, reader)
        plan = plan_tensors(expand(table, model.sizes), source, model.sizes, target)
    return PreparedExport(request, model, metadata, config, plan)


def _with_lora(
    request: ExportRequest, model: ModelDescription, options: LoRAOptions, reader: TorchDistReader, target: Target
) -> tuple[dict[str, Any], list[LazyTensor]]:
    """Return the configuration and the tensors of the dense model with LoRA merged into it, or of a PEFT adapter."""
    if request.format not in (None, "merged", "adapter"):
        raise MixMoEError(f"--format {request.format} goes with models that have experts: LoRA's are merged, adapter.")
    if request.format == "adapter":
        units = expand(LORA_ROWS, model.sizes)
        base = published_name(request.base_model or model.hf_config.get("_name_or_path"))
        return peft_adapter.adapter_config(options, base), plan_tensors(
            units, reader, model.sizes, target, peft_adapter.NOT_LORA
        )
    plan = plan_tensors(expand(TABLES["same"], model.sizes), reader, model.sizes, target, peft_adapter.IS_LORA)
    return dict(model.hf_config), list(peft_adapter.merged(plan, reader, options))


def _form(
    request: ExportRequest, model: ModelDescription, reader: TorchDistReader
) -> tuple[dict[str, Any], Collection[Row], TensorSource]:
    """Return config.json, the mapping table and the source of what the table's rows read."""
    if request.format is not None and (model.options is None or request.format in ("merged", "adapter")):
        kind = "LoRA" if request.format in ("merged", "adapter") else "experts"
        raise MixMoEError(f"--format {request.format} goes with models that have {kind}: leave it out.")
    if model.options is None:
        return dict(model.hf_config), TABLES["same"], reader
    if (request.format or method_of(model.phase).exports_as) == qwen2_moe.MODEL_TYPE:
        config = qwen2_moe.qwen2_moe_config(model.hf_config, model.options, model.sizes)
        source = qwen2_moe.ScaledSource(reader, model.options)
        return config, qwen2_moe.qwen2_moe_rows(model.sizes), source
    return mixmoe_config(model.hf_config, model.options, model.sizes), TABLES["same"], reader


def _check_experts(model: ModelDescription, reader: TorchDistReader) -> None:
    """Raise if the checkpoint's experts are not those of the phase its metadata tells."""
    found = sum(any(f".{group}_experts." in name for name in reader.names()) for group in GROUPS)
    if found != model.phase.stage:
        held = ("no experts (a dense model)", "LM experts only", "LM and MT experts")[found]
        raise MixMoEError(f"{METADATA_FILE} says phase {model.phase.name!r}, but the weights hold {held}.")


def _config(prepared: PreparedExport) -> dict[str, Any]:
    """Return the config.json to write."""
    config = dict(prepared.config)
    if prepared.is_adapter:
        return config
    for name in [n for n in ("torch_dtype", "dtype") if n in config] or ["torch_dtype"]:
        config[name] = _declared_dtype(prepared)
    return config


def _declared_dtype(prepared: PreparedExport) -> str:
    """Return the dtype that config.json names: the base's if weights have it, else that of most of them."""
    values: Counter[str] = Counter()
    for tensor in prepared.plan:
        is_router = any(part in tensor.name for part in _ROUTERS)  # float32 beside any other dtype
        if math.prod(tensor.shape) and not is_router:
            values[tensor.dtype] += math.prod(tensor.shape)
    declared = prepared.model.hf_config.get("dtype") or prepared.model.hf_config.get("torch_dtype")
    return str(declared) if declared in values else values.most_common(1)[0][0]


def run_export(prepared: PreparedExport, ranks: Ranks = ALONE) -> None:
    """Write the Hugging Face directory: weights, config, code, tokenizer, model card and metadata, all or nothing.

    Args:
        prepared: the same on every rank.
        ranks: those that share the work; all of them must call this.

    Raises:
        MixMoEError: the output directory may not be replaced, the disk is full, or a stored tensor is damaged.
    """
    request, plan = prepared.request, prepared.plan
    total = sum(t.num_bytes for t in plan)
    ranks.on_first(lambda: check_space(request.output_dir, total))
    with (
        whole_directory(request.output_dir, request.force, ranks) as directory,
        progress(total // ranks.size, "to Hugging Face", ranks.rank) as advance,
    ):
        file_bytes = max(total, 1) if prepared.is_adapter else request.max_shard_bytes  # an adapter is one file
        write_safetensors(directory, plan, file_bytes, advance, ranks)

        def finish() -> None:
            verify_written(plan, SafetensorsReader(directory))
            if prepared.is_adapter:
                (directory / SINGLE_FILE).rename(directory / peft_adapter.ADAPTER_WEIGHTS)
            _write_beside_the_weights(prepared, _config(prepared), directory)

        ranks.on_first(finish)


def _write_beside_the_weights(prepared: PreparedExport, config: dict[str, Any], directory: Path) -> None:
    request, metadata, source = prepared.request, prepared.metadata, Path(prepared.request.checkpoint_dir)
    name = ADAPTER_FILE if prepared.is_adapter else CONFIG_FILE
    (directory / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_side_files(source / TOKENIZER_DIR, directory)
    if config.get("model_type") == "mixmoe":
        copy_code(directory)
    shutil.copyfile(source / METADATA_FILE, directory / METADATA_FILE)
    base_model = published_name(request.base_model or metadata.hf_config.get("_name_or_path"))
    parameters = sum(math.prod(tensor.shape) for tensor in prepared.plan)
    with whole_file(directory / "README.md") as stream:
        stream.write(model_card(metadata, base_model, parameters))
