"""LLaMA-Pro: copies of some blocks are put between the blocks of the base, and only they learn.

A copy starts as the identity: the projections by which its attention and its FFN add to the hidden states are zero.

Source: LLaMA Pro (arXiv:2401.02415) section 3; which blocks are copied, where P does not divide L: its released code.
"""

from __future__ import annotations

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import NEW_LAYERS, Method, Phase

#: One block of so many is copied, unless the user says how many: 8 of Llama-2-7B's 32, as in the paper.
BLOCKS_A_COPY = 4

EXPANDED = Phase(
    name="llama_pro",
    groups=(),
    trains=(NEW_LAYERS,),
    starts_from=("llama_pro",),
    data=("monolingual", "parallel"),
    made_by="convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method llama_pro.",
)
LLAMA_PRO = Method("llama_pro", "new blocks between those of the base, which is frozen", (EXPANDED,))


def copied_blocks(num_layers: int, new_blocks: int | None = None) -> list[int]:
    """Return the 0-based numbers of the blocks that are copied, each copy standing behind its block.

    Args:
        num_layers: L, blocks of the base.
        new_blocks: P, how many copies; from 1 to L. None: one for each `BLOCKS_A_COPY` of the base.

    Raises:
        MixMoEError: P is out of its range.
    """
    new_blocks = max(1, num_layers // BLOCKS_A_COPY) if new_blocks is None else new_blocks
    if not 1 <= new_blocks <= num_layers:
        raise MixMoEError(f"--new-blocks must be from 1 to the {num_layers} layers of the base, not {new_blocks}.")
    return [(copy + 1) * num_layers // new_blocks - 1 for copy in range(new_blocks)]
