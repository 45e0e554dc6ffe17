"""Hugging Face -> Megatron: a dense model as it is, a dense model upcycled, or an exported Mix-MoE model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits
from mixmoe_megatron.checkpoint.fingerprint import HashedSource
from mixmoe_megatron.checkpoint.hf_files import side_files
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, read_metadata
from mixmoe_megatron.checkpoint.output_dir import check_output_dir
from mixmoe_megatron.checkpoint.safetensors_io import SafetensorsReader
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import TensorSource
from mixmoe_megatron.conversion import qwen2_moe
from mixmoe_megatron.conversion.deeper import DeeperSource
from mixmoe_megatron.conversion.exported import options_from_hf
from mixmoe_megatron.conversion.hf_config import CONFIG_FILE, dense_config, megatron_args_from_hf, read_hf_config
from mixmoe_megatron.conversion.peft_adapter import AdaptedSource, read_adapter_options
from mixmoe_megatron.conversion.plan import Target, check_stacks, expand, plan_tensors
from mixmoe_megatron.conversion.prepared import PreparedCheckpoint
from mixmoe_megatron.conversion.regrouped import RegroupedFFN, RegroupedSource
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.data.tokenizers import check_number_of_ids, count_ids
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import METHODS, phase_of_stage
from mixmoe_megatron.model.mapping import TABLES, Row
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import ModelDescription

# Buffers that old Llama checkpoints store beside their weights.
_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ImportRequest:
    """What `hf_to_mixmoe.py` is asked to do.

    Attributes:
        hf_dir: directory with config.json and safetensors weights.
        output_dir: the checkpoint to make.
        options: upcycle a dense model with these; None keeps a dense model dense.
        method: name of the method whose start a dense model becomes; None: Mix-MoE with options, else full fine-tuning.
        new_blocks: how many blocks a deeper start gets; None: as the method has it.
        lora: options of LoRA; None: its defaults, or the adapter's.
        adapter: directory of a PEFT adapter to take LoRA's matrices from; None: they are new.
        seed: of the weights drawn for routers and LoRA.
        dtype: `keep`, `fp32` or `bf16`; routers are never cast.
        make_vocab_size_divisible_by: pads the vocabulary with zero rows; None: see hf_config.vocab_multiple.
        check_finite: refuse weights that hold NaN or infinite values.
        force: replace an output directory that has content.
        created_by: the command line, for the metadata.
        config: what config.json says, where it has been read already.
        ffns: by layer, an FFN as it is to be cut, where that is not as it stands.
        measured: what an upcycled start costs, for the metadata.
    """

    hf_dir: str
    output_dir: str
    options: MixMoEOptions | None = None
    method: str | None = None
    new_blocks: int | None = None
    lora: LoRAOptions | None = None
    adapter: str | None = None
    seed: int = 1234
    dtype: str = "keep"
    make_vocab_size_divisible_by: int | None = None
    check_finite: bool = False
    force: bool = False
    created_by: str = "hf_to_mixmoe.py"
    config: dict[str, Any] | None = None
    ffns: Mapping[int, RegroupedFFN] | None = None
    measured: dict[str, Any] | None = None

    @property
    def start(self) -> Phase:
        """The phase that a dense model becomes."""
        return METHODS[self.method or ("full" if self.options is None else "mixmoe")].phases[0]


class _TiedSource(SafetensorsReader):
    """Weights whose config ties the output layer; a stored copy of it is accepted if it equals the embedding."""

    def names(self) -> list[str]:
        """Return the names, the stored copy of the embedding left out.

        Raises:
            MixMoEError: the stored output layer differs from the embedding in shape or dtype.
        """
        names = list(super().names())
        if _OUTPUT in names and _EMBEDDING in names:
            if (self.shape(_OUTPUT), self.dtype(_OUTPUT)) != (self.shape(_EMBEDDING), self.dtype(_EMBEDDING)):
                raise self._differs()
            names.remove(_OUTPUT)
        return names

    def read_region(self, name: str, region: Region) -> Bits:
        """As the base class; what is read of the embedding is compared with the stored copy.

        Raises:
            MixMoEError: they differ, or the file cannot be read.
        """
        values = super().read_region(name, region)
        has_copy = name == _EMBEDDING and _OUTPUT in super().names()
        if has_copy and not np.array_equal(super().read_region(_OUTPUT, region), values):
            raise self._differs()
        return values

    def _differs(self) -> MixMoEError:
        return MixMoEError(
            f"config.json ties the word embeddings, but {_OUTPUT} differs from {_EMBEDDING} (in values, shape or "
            "dtype): remove the one from the weights, or set tie_word_embeddings to false."
        )


def _shipped_metadata(hf_dir: str, config: dict[str, Any]) -> Metadata | None:
    """Return the metadata that an export carries; it tells `upcycled` from `stage1`, config.json tells 1 from 2.

    Raises:
        MixMoEError: it or config.json tells no stage, or they contradict each other.
    """
    number = config.get("stage")
    if number not in (1, 2):
        raise MixMoEError(f"config.json: stage must be 1 or 2, not {number!r}.")
    if not (Path(hf_dir) / METADATA_FILE).is_file():
        return None
    metadata = read_metadata(hf_dir)
    if metadata.phase.stage != number:
        raise MixMoEError(f"{METADATA_FILE} says {metadata.phase.name!r}, but config.json says stage {number}.")
    return metadata


def open_weights(directory: Path) -> TensorSource:
    """Return the weights of a Hugging Face directory, or of one iteration of a checkpoint.

    Raises:
        MixMoEError: they are missing, or damaged as far as headers tell.
    """
    if not (directory / CONFIG_FILE).is_file():
        return TorchDistReader(directory)
    return _hf_weights(directory, read_hf_config(directory))


def _hf_weights(directory: str | Path, config: dict[str, Any]) -> SafetensorsReader:
    return _TiedSource(directory) if config.get("tie_word_embeddings", False) else SafetensorsReader(directory)


def prepare_import(request: ImportRequest) -> PreparedCheckpoint:
    """Read configuration and headers, and check that every tensor has its place. Writes nothing.

    Raises:
        MixMoEError: anything wrong with the input or the request.
    """
    check_output_dir(request.output_dir, request.force)
    prepared = read_hf_model(request)
    ids = count_ids(request.hf_dir)
    if ids is not None:
        check_number_of_ids(f"The tokenizer in {request.hf_dir}", ids, prepared.model.sizes.vocab_size)
    if prepared.model.sizes.is_stacked:
        check_stacks(prepared.plan)
    return prepared


def read_hf_model(request: ImportRequest) -> PreparedCheckpoint:
    """As `prepare_import`, without a thought for the output directory: for those who load the plan into a model.

    Raises:
        MixMoEError: anything wrong with the input.
    """
    config = read_hf_config(request.hf_dir) if request.config is None else request.config
    side_files(request.hf_dir)  # a bad link is told before hours of work
    reading = _reading(request, config)
    model = reading.model
    if (multiple := request.make_vocab_size_divisible_by) is not None:
        args = {**model.megatron_args, "make_vocab_size_divisible_by": multiple}
        model = replace(model, megatron_args=args)
    model.checkpoint_args()  # refuses options that do not fit
    source = HashedSource(_hf_weights(request.hf_dir, config))
    target = Target("megatron", request.dtype, model.options, request.seed, request.check_finite)
    units = expand(reading.rows, model.sizes)
    plan = plan_tensors(units, reading.rearranged(source), model.sizes, target, _NOT_WEIGHTS)
    metadata = Metadata(
        phase=model.phase,
        options=model.recorded_options(),
        megatron_args=model.megatron_args,
        hf_config=model.hf_config,
        created_by=request.created_by,
        data=reading.data,
        measured=request.measured,
    )
    parent = Path(request.hf_dir)
    return PreparedCheckpoint(
        request.output_dir, request.force, model, metadata, plan, source, parent, reading.parent_phase
    )


@dataclass(frozen=True)
class _Reading:
    """How a Hugging Face directory is read.

    Attributes:
        model: what it becomes.
        parent_phase: name of the phase of what lies there.
        rows: the mapping table.
        data: what it was trained on.
        rearranged: the source that the table's rows read, given that of the files.
    """

    model: ModelDescription
    parent_phase: str
    rows: Collection[Row] = TABLES["same"]
    data: list[dict[str, Any]] = field(default_factory=list)
    rearranged: Callable[[TensorSource], TensorSource] = lambda source: source


def _reading(request: ImportRequest, config: dict[str, Any]) -> _Reading:
    if config.get("model_type") == "mixmoe":
        return _exported_mixmoe(request, config)
    if config.get("model_type") == qwen2_moe.MODEL_TYPE:
        return _exported_qwen2_moe(request, config)
    start = request.start
    if request.adapter is not None:
        return _adapted(request, config)
    if start.has_new_layers and request.new_blocks is None and (Path(request.hf_dir) / METADATA_FILE).is_file():
        metadata = read_metadata(request.hf_dir)
        if metadata.phase.has_new_layers:
            return _exported_deeper(metadata, config)
    model = describe_start(config, start, options=request.options, new_blocks=request.new_blocks, lora=request.lora)
    if start.has_new_layers:
        layers = model.sizes.num_layers
        return _Reading(model, "dense", rearranged=lambda source: DeeperSource(source, model.new_layers, layers))
    if start.has_adapters:
        return _Reading(model, "dense", TABLES["new lora"])
    if not start.groups:
        return _Reading(model, "dense")
    if model.options is not None and model.options.shared_experts:  # what cannot leave is told before it is trained
        qwen2_moe.qwen2_moe_config(config, model.options, model.sizes)
    if model.options is not None and model.options.expert_init == "important" and request.ffns is None:
        raise MixMoEError("expert_init=important needs text to measure on: give hf_to_mixmoe.py --measure FILE.")
    ffns = request.ffns or {}
    regrouped = (lambda source: RegroupedSource(source, ffns)) if ffns else (lambda source: source)
    return _Reading(model, "dense", TABLES["upcycle"], rearranged=regrouped)


def _exported_deeper(metadata: Metadata, config: dict[str, Any]) -> _Reading:
    """A dense model that was exported with new layers."""
    args = megatron_args_from_hf(config)
    if metadata.megatron_args.get("num_layers") != args["num_layers"]:
        raise MixMoEError(
            f"{METADATA_FILE} says {metadata.megatron_args.get('num_layers')} layers, but config.json "
            f"{args['num_layers']}."
        )
    model = ModelDescription(config, args, None, metadata.phase, new_layers=metadata.new_layers)
    return _Reading(model, metadata.phase.name, data=metadata.data)


def _adapted(request: ImportRequest, config: dict[str, Any]) -> _Reading:
    """A dense model and a PEFT adapter of it."""
    adapter = request.adapter
    assert adapter is not None
    if request.lora is not None:
        raise MixMoEError("--adapter brings its own rank and alpha: leave --lora-rank and --lora-alpha out.")
    model = describe_start(config, request.start, lora=read_adapter_options(adapter))
    data = read_metadata(adapter).data if (Path(adapter) / METADATA_FILE).is_file() else []
    return _Reading(model, "dense", TABLES["lora"], data, lambda source: AdaptedSource(source, adapter))


def _exported_mixmoe(request: ImportRequest, config: dict[str, Any]) -> _Reading:
    if request.options is not None:
        raise MixMoEError(
            f"{request.hf_dir} is a Mix-MoE model already: its options are fixed, leave the option flags out."
        )
    shipped = _shipped_metadata(request.hf_dir, config)
    options = options_from_hf(config, shipped)
    base_config = dense_config(config)
    if shipped and shipped.hf_config.get("_name_or_path"):
        base_config["_name_or_path"] = shipped.hf_config["_name_or_path"]
    phase = shipped.phase if shipped else phase_of_stage(config["stage"])
    parent = "dense" if phase.name == "upcycled" else phase.name
    model = ModelDescription(base_config, megatron_args_from_hf(config), options, phase)
    return _Reading(model, parent, data=shipped.data if shipped else [])


def _exported_qwen2_moe(request: ImportRequest, config: dict[str, Any]) -> _Reading:
    if not (Path(request.hf_dir) / METADATA_FILE).is_file():
        raise MixMoEError(
            f"{request.hf_dir} is a Qwen2Moe model without {METADATA_FILE}: only what this package exported is taken."
        )
    metadata = read_metadata(request.hf_dir)
    base, options = metadata.hf_config, MixMoEOptions.from_dict(metadata.options or {})
    model = ModelDescription(base, megatron_args_from_hf(base), options, metadata.phase)
    qwen2_moe.check_qwen2_moe_config(config, base, options, model.sizes)
    return _Reading(
        model, metadata.phase.name, qwen2_moe.qwen2_moe_rows(model.sizes), metadata.data,
        lambda source: qwen2_moe.UnscaledSource(source, options),
    )  # fmt: skip
