"""All changes to stock Megatron, in the order in which they are made, and what each is for.

Megatron-LM 0.19.2 is the version that they were read at; another minor release is refused. Everything else goes through
what Megatron offers: layer specs, `pre_wrap_hooks`, `finalize_model_grads_func`, the tracker of MoE metrics. A change
that is not listed here does not exist (tests/repo/test_patches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mixmoe_megatron.machine import check_megatron_version, this_machine
from mixmoe_megatron.megatron_patches.compilation import compile_nothing
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.training.megatron_args import MegatronArgs

if TYPE_CHECKING:  # it imports Megatron, which `prepare_megatron` must come before
    from mixmoe_megatron.megatron_patches.between_steps import Measurement


def prepare_megatron() -> None:
    """Make the installed Megatron start on this machine; call it before Megatron's own modules are imported.

    Raises:
        MixMoEError: another Megatron than the supported one, or a Transformer Engine that cannot be imported.
    """
    machine = this_machine()
    check_megatron_version()  # what follows rests on its internals
    compile_nothing(machine)  # no Makefile is in its wheel, and no C compiler may be on this machine
    enable_cpu_mode()  # it asks for CUDA devices, streams and random states by name


def install(
    args: MegatronArgs,
    *,
    saving: bool = True,
    after_save: Callable[[int], None] = lambda iteration: None,
    measurement: tuple[Measurement, int] | None = None,
) -> None:
    """Make the changes that a run needs; call it before the model is built. A second call adds nothing to the first.

    Args:
        args: Megatron's validated namespace, Mix-MoE options applied.
        saving: whether checkpoints are saved securely; a stock script saves as it always does.
        after_save: called on all ranks with the number of each iteration that has been saved, if `saving`.
        measurement: what is measured between training steps, and how many steps lie between.
    """
    # These modules import Megatron, which `prepare_megatron` must come before.
    from mixmoe_megatron.megatron_patches.between_steps import measure_between_steps
    from mixmoe_megatron.megatron_patches.optimizer_kernels import use_torch_kernels
    from mixmoe_megatron.megatron_patches.optimizer_state import mend_optimizers
    from mixmoe_megatron.megatron_patches.saving import secure_saving
    from mixmoe_megatron.megatron_patches.throughput import install_metrics

    use_torch_kernels()  # fused optimizer kernels are taken as soon as they import, and need a GPU
    mend_optimizers()  # the step of torch's Adam, of ranks without parameters, and another --lr get lost in a resume
    install_metrics(args)  # frozen weights and padding would be counted as trained
    if measurement is not None:
        measure_between_steps(*measurement)  # it evaluates on batches of its validation data alone
    if saving:
        secure_saving(after_save)  # a kill in the middle of a save would leave a checkpoint that cannot be read
