"""What the words of hf_to_mixmoe.py ask for: the method, and the Mix-MoE options."""

from __future__ import annotations

import argparse

from mixmoe_megatron.conversion.measured_start import MEASURED_OPTIONS
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Method
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import METHODS
from mixmoe_megatron.model.options import OPTION_NAMES, MixMoEOptions

#: model_type of what this package exports with experts: such a model has its options
EXPORTS = ("mixmoe", "qwen2_moe")


def method_from_arguments(args: argparse.Namespace) -> Method:
    """Return the method whose start is asked for.

    Args:
        args: method, dense and measure.

    Raises:
        MixMoEError: they contradict each other.
    """
    if args.dense and args.method not in (None, "full"):
        raise MixMoEError(f"--dense is short for --method full: leave it or --method {args.method} out.")
    method = METHODS["full" if args.dense else args.method or "mixmoe"]
    if args.measure and not method.phases[0].groups:
        raise MixMoEError("--measure tells what upcycling costs, but nothing is upcycled: leave it out.")
    return method


def lora_from_arguments(args: argparse.Namespace) -> LoRAOptions | None:
    """Return LoRA's options where one is given.

    Args:
        args: lora_rank and lora_alpha.

    Raises:
        MixMoEError: one is out of its range.
    """
    if args.lora_rank is None and args.lora_alpha is None:
        return None
    rank = LoRAOptions.lora_rank if args.lora_rank is None else args.lora_rank
    return LoRAOptions(rank, 2.0 * rank if args.lora_alpha is None else args.lora_alpha)


def options_from_arguments(args: argparse.Namespace, method: Method, is_mixmoe: bool) -> MixMoEOptions | None:
    """Return the options to upcycle with, or None when nothing is upcycled.

    Args:
        args: the command's namespace.
        method: see `method_from_arguments`.
        is_mixmoe: whether the model is an export with experts already.

    Raises:
        MixMoEError: option flags where no experts are made, or a bad value.
    """
    given = {name: value for name, value in vars(args).items() if name in OPTION_NAMES and name != "preset"}
    makes_experts = bool(method.phases[0].groups)
    if (not makes_experts or is_mixmoe) and (given or args.preset):
        what = "the model has experts already" if is_mixmoe else f"the method {method.name} makes no experts"
        flags = ", ".join("--" + name.replace("_", "-") for name in [*given, *(["preset"] if args.preset else [])])
        raise MixMoEError(f"{what}: leave out {flags}.")
    if is_mixmoe and args.measure:
        raise MixMoEError("--measure tells what upcycling costs, but nothing is upcycled: leave it out.")
    if is_mixmoe and (args.dense or args.method is not None):
        raise MixMoEError("--dense or --method does not go with a Mix-MoE model.")
    if is_mixmoe or not makes_experts:
        return None
    if args.measure and {**method.options, **given}.get("shared_experts"):
        raise MixMoEError("--measure has no model with a shared expert to measure: leave it out.")
    measured = MEASURED_OPTIONS if args.measure and args.preset is None else {}
    return MixMoEOptions.from_preset(args.preset or "recommended", **{**method.options, **measured, **given})
