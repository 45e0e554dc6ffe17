"""LoRA: low-rank matrices beside the linear layers of the base, which is frozen.

Source: LoRA (arXiv:2106.09685); which layers, rank, alpha and first values: PEFT's, with LLaMA-Factory's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import ADAPTERS, Method, Phase

ADAPTED = Phase(
    name="lora",
    groups=(),
    trains=(ADAPTERS,),
    starts_from=("lora",),
    data=("monolingual", "parallel"),
    made_by="convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method lora.",
)
LORA = Method("lora", "low-rank matrices beside the base's linear layers", (ADAPTED,))


@dataclass(frozen=True)
class LoRAOptions:
    """What LoRA leaves open. A layer gives W x + (alpha / rank) B A x.

    Attributes:
        lora_rank: r, rows of A and columns of B.
        lora_alpha: alpha.

    Raises:
        MixMoEError: one is not positive.
    """

    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        if isinstance(self.lora_rank, bool) or not isinstance(self.lora_rank, int) or self.lora_rank < 1:
            raise MixMoEError(f"lora_rank must be a positive integer, got {self.lora_rank!r}.")
        if not isinstance(self.lora_alpha, int | float) or not 0 < self.lora_alpha < float("inf"):
            raise MixMoEError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}.")

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.lora_alpha / self.lora_rank

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LoRAOptions:
        """Return the options that metadata record.

        Raises:
            MixMoEError: one is missing, unknown or out of its range.
        """
        if values.keys() != {"lora_rank", "lora_alpha"}:
            raise MixMoEError(f"the options of LoRA are lora_rank and lora_alpha, not {', '.join(values) or 'none'}.")
        return LoRAOptions(**values)
