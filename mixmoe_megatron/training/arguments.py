"""Command-line arguments: Megatron's own plus a handful of ours, completed from the checkpoint that a run starts from.

The architecture and the Mix-MoE options were fixed when the checkpoint was made, and are recorded in its
`mixmoe_metadata.json`. They are put *before* the user's words on the command line, so nobody has to repeat a model's
sizes, everything goes through Megatron's own parser, and a flag that the user gives still wins.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any, NoReturn

from megatron.training.arguments import parse_args

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, read_metadata, require_phase
from mixmoe_megatron.conversion.hf_config import check_architecture
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import this_machine
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.registry import PHASES, STAGES, trained_phases
from mixmoe_megatron.model.config import EXPERTS_BACKENDS, check_expert_parallel
from mixmoe_megatron.model.options import PAPER_AUX_LOSS_COEFF, MixMoEOptions, mixmoe_megatron_args
from mixmoe_megatron.model.sizes import padded_vocab_size
from mixmoe_megatron.training.hf_directories import is_hf_directory, open_hf_start
from mixmoe_megatron.training.megatron_args import MegatronArgs

#: Megatron defaults that suit this project; the user's flags come later and win.
_DEFAULTS = {
    "tokenizer_type": "HuggingFaceTokenizer",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "ckpt_format": "torch_dist",
    "dist_ckpt_optim_fully_reshardable": True,
    "no_create_attention_mask_in_dataloader": True,
    "moe_aux_loss_coeff": PAPER_AUX_LOSS_COEFF,
    "expert_tensor_parallel_size": 1,
    "eval_interval": 1000,
    "rerun_mode": "disabled",  # a loss that is not finite ends the run at once; Megatron would look for a broken GPU
    "moe_token_dispatcher_type": "alltoall",  # exchanges different numbers of tokens; allgather cannot
}
#: arguments of the architecture that a run may change: regularisation, and sizes that no weight has
_FREE = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
)
_MEGATRON_ROTARY_BASE = 10000  # its default
#: argument that is switched off by a flag of another name
_OFF_FLAGS = {"add_bias_linear": "--disable-bias-linear"}


def add_mixmoe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser (for `parse_args(extra_args_provider=...)`).

    The parser then refuses a word with one sentence, not with the usage of Megatron's 700 lines.
    """
    parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:  # a lone % in Megatron's own texts breaks --help
        action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help or "")
    group = parser.add_argument_group("Mix-MoE")
    _add_phase(group)
    _add_lpr(group)
    group.add_argument(
        "--init-from",
        "--hf-load",
        metavar="DIR",
        help="Checkpoint to start from: upcycled for stage 1, stage 1 for stage 2, dense for stage 0, as the method's "
        "conversion makes it for others; or such a Hugging Face directory, a dense one for all but stage 2. Not used "
        "once --load holds a checkpoint of this run.",
    )
    group.add_argument(
        "--upcycle-options",
        metavar="X",
        help="A phase with experts from a dense Hugging Face directory: a preset's name or a JSON object of options "
        "(options.py).",
    )
    group.add_argument("--hf-save", metavar="DIR", help="Also write each saved iteration as DIR/iter_N, Hugging Face.")
    group.add_argument(
        "--experts-backend",
        choices=EXPERTS_BACKENDS,
        default="auto",
        help="Grouped GEMM of the experts; auto: Transformer Engine when it is installed, else torch.",
    )
    group.add_argument(
        "--loss-on",
        choices=("target", "all"),
        default="target",
        help="Parallel text: count the loss on target + EOS only, or on all tokens.",
    )
    group.add_argument(
        "--pack",
        action="store_true",
        help="Parallel text: a sample is as many whole documents as fit in --seq-length, each attending to itself "
        "alone; next to nothing is padded.",
    )
    group.add_argument(
        "--eval-mono",
        nargs="+",
        metavar="FILE",
        help="Held-out monolingual text: log the bits a byte of each file's first 64 KiB before, during and after "
        "training.",
    )
    group.add_argument("--eval-mono-interval", type=int, metavar="N", help="Steps between; default: --eval-interval.")
    group.add_argument(
        "--dry-run", action="store_true", help="Print the report of trainable and frozen parameters, and stop."
    )
    return parser


def _add_phase(group: argparse._ArgumentGroup) -> None:
    phases = trained_phases().values()
    group.add_argument(
        "--phase",
        choices=[phase.name for phase in phases],
        help="; ".join(f"{p.name}: {' and '.join(p.trains)} on {' or '.join(p.data)} text" for p in phases),
    )
    group.add_argument(
        "--mixmoe-stage",
        type=int,
        choices=sorted(STAGES),
        help="Short for --phase: " + ", ".join(f"{number} {phase.name}" for number, phase in STAGES.items()) + ".",
    )


def _add_lpr(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lpr-coeff",
        type=float,
        default=0.0,
        metavar="X",
        help="MoE-LPR: weight of the loss that asks the router to give tokens of original languages to the base's FFN "
        "(default: 0.1 in the phase lpr_router, 0 in others).",
    )
    group.add_argument(
        "--lpr-impl",
        default="paper",
        choices=("paper", "released"),
        help="MoE-LPR: -log p of the base's FFN, or as in the released code, which takes the softmax of p once more "
        "and so has a floor: for comparisons with it alone (default: paper).",
    )
    group.add_argument(
        "--lpr-original-data-path",
        nargs="+",
        metavar="PREFIX",
        help="MoE-LPR: those of the --data-path prefixes whose text is in original languages of the base.",
    )


def _refuse(message: str) -> NoReturn:
    raise MixMoEError(f"{message} (--help lists the flags).")


def parse_arguments(words: list[str]) -> tuple[MegatronArgs, Metadata]:
    """Parse a command line, completed from the checkpoint that the run starts from or goes on from.

    Args:
        words: the command line, without the program's name.

    Returns:
        Megatron's namespace, not validated yet, with the recorded options; and the metadata of that checkpoint.

    Raises:
        MixMoEError: as `model_arguments` and `apply_options`, or a word is not one of a flag.
    """
    words, metadata = complete_arguments(words)
    own_words, sys.argv[1:] = sys.argv[1:], words  # which is where Megatron's parser reads
    try:
        args = parse_args(add_mixmoe_args)
    finally:
        sys.argv[1:] = own_words
    set_phase(args, _phase(args.phase, args.mixmoe_stage))
    apply_options(args, metadata)
    return args, metadata


def set_phase(args: MegatronArgs, phase: Phase) -> None:
    """Put the phase on Megatron's namespace: its name, and its stage's number, from where the model's config takes it.

    Args:
        args: the parsed namespace.
        phase: to train.
    """
    args.phase, args.mixmoe_stage = phase.name, phase.stage


def phase_of_run(args: MegatronArgs) -> Phase:
    """Return the phase that a run trains.

    Args:
        args: Megatron's namespace, see `set_phase`.
    """
    return PHASES[args.phase]


def complete_arguments(words: list[str]) -> tuple[list[str], Metadata]:
    """Put what the checkpoint and the machine determine in front of the user's words.

    Args:
        words: the command line, without the program's name.

    Returns:
        The completed command line, and the metadata of the checkpoint that the run starts from or goes on from.

    Raises:
        MixMoEError: as `model_arguments`.
    """
    model, metadata = model_arguments(words)
    return this_machine().flags() + model + words, metadata


def model_arguments(words: list[str]) -> tuple[list[str], Metadata]:
    """Return this project's defaults and what the checkpoint determines: sizes, router, vocabulary, tokenizer.

    Args:
        words: the command line, without the program's name.

    Returns:
        The flags, and the metadata of the checkpoint that the run starts from or goes on from.

    Raises:
        MixMoEError: no checkpoint is named, it is of the wrong stage, or a number is not one.
    """
    early, phase = _flags_that_name_the_model(words)
    directory, metadata = source_checkpoint(early.load, early.init_from, phase, early.upcycle_options)
    model = dict(metadata.megatron_args)
    if phase.groups:
        options = MixMoEOptions.from_dict(metadata.options or {})
        model |= mixmoe_megatron_args(options, phase.stage, model["num_layers"], model["ffn_hidden_size"])
    if not isinstance(model["rotary_base"], int):
        del model["rotary_base"]  # Megatron parses whole ones only: see `apply_options`
    multiple = early.make_vocab_size_divisible_by or model["make_vocab_size_divisible_by"]
    multiple *= early.tensor_model_parallel_size
    if multiple < 1:
        raise MixMoEError("--make-vocab-size-divisible-by and --tensor-model-parallel-size must be 1 or more.")
    model.setdefault("padded_vocab_size", padded_vocab_size(model["vocab_size"], multiple))
    tokenizer = directory if is_hf_directory(directory) else directory / "tokenizer"
    return _words({**_DEFAULTS, **phase.defaults, "tokenizer_model": str(tokenizer), **model}), metadata


def _flags_that_name_the_model(words: list[str]) -> tuple[argparse.Namespace, Phase]:
    """Parse the few flags that must be known before Megatron's parser can be given a complete command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]
    for flag in ("--load", "--upcycle-options"):
        parser.add_argument(flag)
    parser.add_argument("--init-from", "--hf-load")
    parser.add_argument("--phase")
    parser.add_argument("--mixmoe-stage", type=int)
    parser.add_argument("--make-vocab-size-divisible-by", type=int)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    flags, _ = parser.parse_known_args(words)
    return flags, _phase(flags.phase, flags.mixmoe_stage)


def _phase(name: str | None, stage: int | None) -> Phase:
    """Return the phase that --phase or --mixmoe-stage names."""
    phases = trained_phases()
    if name is None and stage is None:
        raise MixMoEError(
            f"give --phase, one of {', '.join(phases)}, or --mixmoe-stage, one of {', '.join(map(str, STAGES))}."
        )
    if stage is not None and stage not in STAGES:
        raise MixMoEError(f"--mixmoe-stage must be one of {', '.join(map(str, STAGES))}; got {stage}.")
    if name is not None and name not in phases:
        raise MixMoEError(f"--phase must be one of {', '.join(phases)}; got {name}.")
    if name is not None and stage is not None and STAGES[stage].name != name:
        raise MixMoEError(f"--mixmoe-stage {stage} is the phase {STAGES[stage].name}, not --phase {name}: give one.")
    return phases[name] if name is not None else STAGES[stage]  # type: ignore[index]


def source_checkpoint(
    load: str | None, init_from: str | None, phase: Phase, upcycle_options: str | None = None
) -> tuple[Path, Metadata]:
    """Return the directory whose metadata describes the model, and that: a run of this phase, else its parent.

    Args:
        load: where a run of this phase may lie.
        init_from: the parent, a checkpoint or a Hugging Face directory.
        phase: to train.
        upcycle_options: see `hf_directories.open_hf_start`.

    Raises:
        MixMoEError: there is neither, or it is of the wrong phase.
    """
    if load is not None and has_checkpoint(load):
        metadata = read_metadata(load)
        require_phase(metadata, phase.name, f"--load {load} must be a run of --phase {phase.name}.")
        check_architecture(metadata)
        return Path(load), metadata
    if init_from is None:
        raise MixMoEError(
            "give --init-from DIR, the checkpoint to start from"
            + (f" (--load {load} holds no checkpoint yet)." if load else ", or --load DIR, the run to go on with.")
        )
    if is_hf_directory(init_from):
        metadata = open_hf_start(init_from, phase, upcycle_options).metadata
    else:
        metadata = read_metadata(init_from)
    require_phase(metadata, phase.starts_from)
    check_architecture(metadata)
    return Path(init_from), metadata


def has_checkpoint(directory: str | Path | None) -> bool:
    """Whether a directory, if one is given, holds a complete Megatron checkpoint with this project's metadata."""
    return directory is not None and all((Path(directory) / name).is_file() for name in (TRACKER_FILE, METADATA_FILE))


def source_directory(args: MegatronArgs) -> Path:
    """Return what a run starts from or goes on from; `source_checkpoint` has seen to it that there is one.

    Args:
        args: Megatron's namespace with Mix-MoE's arguments.
    """
    source = args.load if has_checkpoint(args.load) else args.init_from
    assert source is not None
    return Path(source)


def _words(arguments: dict[str, Any]) -> list[str]:
    """Megatron argument names and values as command-line words; True is a bare flag; False, None are the default."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is False and name in _OFF_FLAGS:
            words.append(_OFF_FLAGS[name])
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value).replace(" ", "") if isinstance(value, list) else str(value))
    return words


def apply_options(args: MegatronArgs, metadata: Metadata) -> None:
    """Put what no flag can say on Megatron's arguments, from where its config builder takes it by name.

    That is the recorded Mix-MoE options, and a --rotary-base that is not whole.

    Raises:
        MixMoEError: a flag makes another architecture of it than the recorded one, or the experts cannot be spread
            evenly over the expert-parallel ranks.
    """
    base = metadata.megatron_args["rotary_base"]
    if not isinstance(base, int) and args.rotary_base == _MEGATRON_ROTARY_BASE:
        args.rotary_base = base
    _check_architecture_flags(args, metadata)
    args.new_layers = metadata.new_layers
    args.lora_rank, args.lora_alpha = astuple(metadata.lora) if metadata.lora else (0, 0.0)
    if metadata.phase.groups and metadata.options is not None:
        options = MixMoEOptions.from_dict(metadata.options)  # some may be younger than the checkpoint
        vars(args).update(options.to_dict())
        check_expert_parallel(args.num_experts_per_group, args.expert_model_parallel_size)


def _check_architecture_flags(args: MegatronArgs, metadata: Metadata) -> None:
    """Refuse flags that would train another model than the checkpoint's: loading might let it pass, an export not."""
    for name, recorded in metadata.megatron_args.items():
        given = getattr(args, name, recorded)
        if name not in _FREE and given is not None and given != recorded:
            flag = "--" + name.replace("_", "-")
            raise MixMoEError(f"{flag} is {recorded} in the checkpoint, not {given}: leave the flag out.")
    rows, padded = metadata.megatron_args["vocab_size"], getattr(args, "padded_vocab_size", None)
    if padded is not None and padded < rows:
        raise MixMoEError(f"--padded-vocab-size {padded} is less than the model's {rows} rows: leave the flag out.")
