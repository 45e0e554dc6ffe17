"""Preludes of training processes: of which rows they compute logits."""

from __future__ import annotations

from typing import Any


def compute_all_logits() -> None:
    """Logits of all rows, as Megatron computes them."""
    from mixmoe_megatron.training import step

    step.rows_of_logits = lambda loss_mask, model: None


def refuse_all_logits() -> None:
    """A training step that computes logits of rows without loss, or of none, ends the process."""
    from mixmoe_megatron.training import step

    losses_of_rows, loss_func = step.losses_of_rows, step.loss_func

    def of_rows(*, labels: Any, context: Any, **kwargs: Any) -> Any:
        assert len(context) < labels.numel(), f"logits of {len(context)} of {labels.numel()} rows"
        of_rows.calls += 1
        return losses_of_rows(labels=labels, context=context, **kwargs)

    def checked(loss_mask: Any, output: Any) -> Any:
        assert of_rows.calls, "logits of all rows"
        of_rows.calls -= 1
        return loss_func(loss_mask, output)

    of_rows.calls = 0
    step.losses_of_rows, step.loss_func = of_rows, checked
