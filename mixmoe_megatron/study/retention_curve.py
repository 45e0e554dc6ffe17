"""What the training logs tell of --eval-mono: has training paid back what the start took?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixmoe_megatron.study.training_log import Curves

_BITS, _TOKENS = "bits_per_byte_", "tokens_seen"


def retention_curves(curves: Curves) -> Curves:
    """Return the curves of bits a byte by the name of their text; steps, 0 for the start, to values."""
    return {name.removeprefix(_BITS): points for name, points in curves.items() if name.startswith(_BITS)}


def tokens_seen(curves: Curves) -> dict[int, float]:
    """Return the tokens seen at each step at which text was measured; empty where the log does not tell."""
    return dict(curves.get(_TOKENS, []))


def retention_of(stages: Mapping[str, Curves], dense_bits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sum up what each stage did to each text.

    Args:
        stages: Title of a training stage to its curves.
        dense_bits: Bits a byte of the dense base by the name of a text, where it is known.

    Returns:
        One entry a stage and text: stage, text, start (bits a byte before the first step; None where the log begins
        later), steps, tokens (None where unknown), last, dense (None where unknown), and paid_back_at: the first step
        with no more bits a byte than the dense base, None where there is none.
    """
    found = []
    for stage, curves in stages.items():
        for text, points in retention_curves(curves).items():
            steps, last = points[-1]
            dense = dense_bits.get(text)
            paid = [step for step, value in points if dense is not None and value <= dense]
            found.append(
                {
                    "stage": stage,
                    "text": text,
                    "start": dict(points).get(0),
                    "steps": steps,
                    "tokens": tokens_seen(curves).get(steps),
                    "last": last,
                    "dense": dense,
                    "paid_back_at": paid[0] if paid else None,
                }
            )
    return found
