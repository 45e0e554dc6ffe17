"""The type of Megatron's namespace of arguments."""

from __future__ import annotations

from typing import Any, Literal, Protocol


class MegatronArgs(Protocol):
    """Megatron's arguments: those that this package adds, those that it sets, and those that many functions read.

    Megatron has some 700 more and no types for them: they are taken by name, as `Any`.
    """

    # of `arguments.add_mixmoe_args`
    phase: str
    mixmoe_stage: int
    init_from: str | None
    upcycle_options: str | None
    hf_save: str | None
    experts_backend: str
    loss_on: Literal["target", "all"]
    pack: bool
    lpr_coeff: float
    lpr_original_data_path: list[str] | None
    eval_mono: list[str] | None
    eval_mono_interval: int | None
    dry_run: bool
    # set here
    lora_alpha: float
    lora_rank: int
    new_layers: tuple[int, ...]
    dataloader_type: str | None
    eval_iters: int
    lr: float | None
    min_lr: float | None
    pretrained_checkpoint: str | None
    rotary_base: float
    split: str | None
    train_iters: int | None
    variable_seq_lengths: bool
    vocab_size: int
    # read in many places
    global_batch_size: int
    load: str | None
    micro_batch_size: int
    rank: int
    save: str | None
    seq_length: int
    skip_train: bool

    def __getattr__(self, name: str) -> Any:
        """Return another of Megatron's arguments."""
