"""Preludes of training processes: of which rows they compute logits."""

from __future__ import annotations

from typing import Any


def compute_all_logits() -> None:
    """Logits of all rows, as Megatron computes them."""
    from mixmoe_megatron.training import step

    step.rows_of_logits = lambda loss_mask, model: None


def refuse_all_logits() -> None:
    """A training step whose rows with logits are not those with loss, up to a multiple, ends the process."""
    from mixmoe_megatron.training import step

    losses_of_rows, loss_func, rows_with_loss = step.losses_of_rows, step.loss_func, step.rows_with_loss

    def chosen(loss_mask: Any, multiple: int = 1) -> Any:
        rows = rows_with_loss(loss_mask, multiple)
        carries = loss_mask.t().flatten() != 0
        assert rows is not None and len(rows.unique()) == len(rows), "logits of all rows, or of a row twice"
        assert carries[rows].sum() == carries.sum() and len(rows) < carries.sum() + multiple, "logits of other rows"
        return rows

    def of_rows(*, labels: Any, context: Any, **kwargs: Any) -> Any:
        assert len(context) < labels.numel(), f"logits of {len(context)} of {labels.numel()} rows"
        of_rows.calls += 1
        return losses_of_rows(labels=labels, context=context, **kwargs)

    def checked(loss_mask: Any, output: Any) -> Any:
        assert of_rows.calls, "logits of all rows"
        of_rows.calls -= 1
        return loss_func(loss_mask, output)

    of_rows.calls = 0
    step.losses_of_rows, step.loss_func, step.rows_with_loss = of_rows, checked, chosen
