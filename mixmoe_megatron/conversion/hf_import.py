"""Hugging Face -> Megatron: a dense model as it is, a dense model upcycled, or an exported Mix-MoE model."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits
from mixmoe_megatron.checkpoint.fingerprint import HashedSource
from mixmoe_megatron.checkpoint.hf_files import TOKENIZER_DIR, copy_side_files, side_files
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, package_versions, read_metadata, write_metadata
from mixmoe_megatron.checkpoint.output_dir import check_output_dir, check_space, whole_directory
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.safetensors_io import SafetensorsReader
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.torch_dist_writer import write_torch_dist
from mixmoe_megatron.conversion.byte_progress import progress
from mixmoe_megatron.conversion.hf_config import dense_config, megatron_args_from_hf, read_hf_config
from mixmoe_megatron.conversion.plan import (
    LazyTensor,
    Target,
    TensorSource,
    check_stacks,
    describe_tensors,
    expand,
    plan_tensors,
    verify_written,
)
from mixmoe_megatron.data.tokenizers import check_number_of_ids, count_ids
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import TABLES, Sizes, extra_state_keys
from mixmoe_megatron.model.options import OPTION_NAMES, MixMoEOptions, mixmoe_megatron_args, resolve_moe_layers
from mixmoe_megatron.model.sizes import STAGE_NUMBERS, model_sizes

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
        seed: of the router weights drawn when upcycling.
        dtype: `keep`, `fp32` or `bf16`; routers are never cast.
        make_vocab_size_divisible_by: pads the vocabulary with zero rows; None: see hf_config.vocab_multiple.
        check_finite: refuse weights that hold NaN or infinite values.
        force: replace an output directory that has content.
        created_by: the command line, for the metadata.
    """

    hf_dir: str
    output_dir: str
    options: MixMoEOptions | None = None
    seed: int = 1234
    dtype: str = "keep"
    make_vocab_size_divisible_by: int | None = None
    check_finite: bool = False
    force: bool = False
    created_by: str = "hf_to_mixmoe.py"


@dataclass(frozen=True)
class PreparedImport:
    """A checked import: everything but the weights is settled."""

    request: ImportRequest
    metadata: Metadata
    sizes: Sizes
    plan: list[LazyTensor]
    source: HashedSource

    def describe(self) -> str:
        """Return the plan for --dry-run."""
        return describe_tensors(self.plan, self.request.output_dir)


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


def options_from_hf(config: dict[str, Any], shipped: Metadata | None = None) -> MixMoEOptions:
    """Return the Mix-MoE options of an exported model's config.json; its model fields win over its record of options.

    Args:
        config: of the exported model.
        shipped: metadata beside it, for the options if config.json records none.

    Raises:
        MixMoEError: the fields are missing or out of range, or contradict each other.
    """
    recorded = config.get("mixmoe") or (shipped and shipped.options) or {}
    if not isinstance(recorded, dict):
        raise MixMoEError(f"config.json: mixmoe must be an object, not {recorded!r}.")
    values = {name: value for name, value in recorded.items() if name in OPTION_NAMES}
    try:
        values["num_experts_per_group"] = config["num_experts_per_group"]
        values["topk_per_group"] = config["topk_per_group"]
        values["group_combine"] = config["group_combine"]
        values["router_prob_scaling"] = config["router_prob_scaling"]
        values["router_bias"] = config["router_bias"]
        layers, scale, width = config["moe_layers"], config["expert_scale"], config["moe_intermediate_size"]
    except KeyError as error:
        raise MixMoEError(f"config.json of this Mix-MoE model lacks {error.args[0]}.") from None
    for name, one in (("num_experts", "num_experts_per_group"), ("num_experts_per_tok", "topk_per_group")):
        if config.get(name) not in (None, config[one] * config["stage"]):
            raise MixMoEError(f"config.json: {name} must be {one} times stage, not {config[name]!r}; or leave it out.")
    if not isinstance(layers, list):
        raise MixMoEError(f"config.json: moe_layers must be a list of layer indices, not {layers!r}.")
    if not (values.get("expert_scale") is None and scale == values["num_experts_per_group"]):
        values["expert_scale"] = scale
    if values["num_experts_per_group"] > 1:
        values["expert_init"] = "copy" if width == config["intermediate_size"] else "slice"
    options = MixMoEOptions.from_dict(values)
    widths = {config["intermediate_size"] // n for n in (1, options.num_experts_per_group)}
    if width not in widths:
        raise MixMoEError(
            f"config.json: moe_intermediate_size must be {' or '.join(map(str, sorted(widths)))}, not {width!r}."
        )
    num_layers = config["num_hidden_layers"]
    has_placement = "moe_layer_placement" in values or num_layers >= options.moe_every
    if not has_placement or resolve_moe_layers(options, num_layers) != layers:
        options = MixMoEOptions.from_dict({**values, "moe_layer_placement": ",".join(map(str, layers))})
    return options


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
    if STAGE_NUMBERS[metadata.stage] != number:
        raise MixMoEError(f"{METADATA_FILE} says {metadata.stage!r}, but config.json says stage {number}.")
    return metadata


def open_weights(directory: Path) -> TensorSource:
    """Return the weights of a Hugging Face directory, or of one iteration of a checkpoint.

    Raises:
        MixMoEError: they are missing, or damaged as far as headers tell.
    """
    if not (directory / "config.json").is_file():
        return TorchDistReader(directory)
    tied = read_hf_config(directory).get("tie_word_embeddings", False)
    return _TiedSource(directory) if tied else SafetensorsReader(directory)


def prepare_import(request: ImportRequest) -> PreparedImport:
    """Read configuration and headers, and check that every tensor has its place. Writes nothing.

    Raises:
        MixMoEError: anything wrong with the input or the request.
    """
    check_output_dir(request.output_dir, request.force)
    prepared = read_hf_model(request)
    ids = count_ids(request.hf_dir)
    if ids is not None:
        check_number_of_ids(f"The tokenizer in {request.hf_dir}", ids, prepared.sizes.vocab_size)
    if not prepared.sizes.moe_layers:
        check_stacks(prepared.plan)
    return prepared


def read_hf_model(request: ImportRequest) -> PreparedImport:
    """As `prepare_import`, without a thought for the output directory: for those who load the plan into a model.

    Raises:
        MixMoEError: anything wrong with the input.
    """
    config = read_hf_config(request.hf_dir)
    side_files(request.hf_dir)  # a bad link is told before hours of work
    megatron_args = megatron_args_from_hf(config)
    if request.make_vocab_size_divisible_by is not None:
        megatron_args["make_vocab_size_divisible_by"] = request.make_vocab_size_divisible_by
    is_mixmoe = config.get("model_type") == "mixmoe"
    if is_mixmoe:
        if request.options is not None:
            raise MixMoEError(
                f"{request.hf_dir} is a Mix-MoE model already: its options are fixed, leave the option flags out."
            )
        shipped = _shipped_metadata(request.hf_dir, config)
        options: MixMoEOptions | None = options_from_hf(config, shipped)
        stage = shipped.stage if shipped else f"stage{config['stage']}"
        base_config = dense_config(config)
        if shipped and shipped.hf_config.get("_name_or_path"):
            base_config["_name_or_path"] = shipped.hf_config["_name_or_path"]
    else:
        shipped, options, base_config = None, request.options, config
        stage = "dense" if options is None else "upcycled"
    if options is not None:
        mixmoe_megatron_args(
            options, STAGE_NUMBERS[stage], megatron_args["num_layers"], megatron_args["ffn_hidden_size"]
        )
    sizes = model_sizes(megatron_args, options, stage)
    table = TABLES["same" if is_mixmoe or options is None else "upcycle"]
    source = HashedSource(open_weights(Path(request.hf_dir)))
    target = Target("megatron", request.dtype, options, request.seed, request.check_finite)
    plan = plan_tensors(expand(table, sizes), source, sizes, target, _NOT_WEIGHTS)
    metadata = Metadata(
        stage=stage,
        options=None if options is None else options.to_dict(),
        megatron_args=megatron_args,
        hf_config=base_config,
        created_by=request.created_by,
        data=shipped.data if shipped else [],
    )
    return PreparedImport(request, metadata, sizes, plan, source)


def run_import(prepared: PreparedImport, ranks: Ranks = ALONE) -> None:
    """Write the checkpoint directory: torch_dist weights, tokenizer files and metadata, all or nothing.

    Args:
        prepared: the same on every rank.
        ranks: those that share the work; all of them must call this.

    Raises:
        MixMoEError: the output directory may not be replaced, the disk is full, or a weight file is damaged.
    """
    request, metadata = prepared.request, prepared.metadata
    parent_stage = "dense" if metadata.stage in ("dense", "upcycled") else metadata.stage
    parent = Path(request.hf_dir)
    write_checkpoint(prepared.plan, metadata, prepared.sizes, prepared.source, parent, parent_stage, request, ranks)


class OutputRequest(Protocol):
    """What `write_checkpoint` needs of a request."""

    @property
    def output_dir(self) -> str:
        """The checkpoint to make."""

    @property
    def force(self) -> bool:
        """Replace a directory that has content."""


def write_checkpoint(
    plan: list[LazyTensor],
    metadata: Metadata,
    sizes: Sizes,
    source: HashedSource,
    parent: Path,
    parent_stage: str,
    request: OutputRequest,
    ranks: Ranks = ALONE,
) -> None:
    """Write a `release` checkpoint directory with tokenizer and metadata, all or nothing.

    Args:
        plan: the tensors, by per-layer name.
        metadata: of the checkpoint; its parent is filled in.
        sizes: of the model.
        source: of the weights, which the plan reads.
        parent: their directory: a Hugging Face one, or a checkpoint's.
        parent_stage: of those weights.
        request: where to.
        ranks: those that share the work; all of them must call this.

    Raises:
        MixMoEError: the output directory may not be replaced, the disk is full, or a weight file is damaged.
    """
    args = {**metadata.megatron_args, "padded_vocab_size": sizes.padded_vocab_size}
    if metadata.options is not None:
        options = MixMoEOptions.from_dict(metadata.options)
        number = STAGE_NUMBERS[metadata.stage]
        args.update(mixmoe_megatron_args(options, number, sizes.num_layers, sizes.ffn_hidden_size))
    total = sum(tensor.num_bytes for tensor in plan)
    ranks.on_first(lambda: check_space(request.output_dir, total))
    with (
        ThreadPoolExecutor(1) as beside,
        whole_directory(request.output_dir, request.force, ranks) as directory,
        progress(total // ranks.size, "to Megatron", ranks.rank) as advance,
    ):
        versions = beside.submit(package_versions)
        stacked = 0 if sizes.moe_layers else sizes.num_layers
        iteration = write_torch_dist(directory, plan, args, stacked, extra_state_keys(sizes), advance, ranks)
        digest = source.fingerprint(ranks)

        def finish() -> None:
            verify_written(plan, TorchDistReader(iteration))
            is_hf = (parent / "config.json").is_file()
            copy_side_files(parent if is_hf else parent / TOKENIZER_DIR, directory / TOKENIZER_DIR)
            metadata.parent = {"path": str(parent), "stage": parent_stage, "weights_xxh128": digest}
            metadata.versions = versions.result()
            write_metadata(directory, metadata)

        ranks.on_first(finish)
