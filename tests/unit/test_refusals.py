"""What Megatron raises before the first step is a sentence; what anything else raises keeps its traceback."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.vocab_utils import calculate_padded_vocab_size

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.refusals import check_loggers, one_sentence


def scheduler(**changes: object) -> None:
    values = {"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": 8}
    values |= {"lr_decay_style": "linear", "start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 8}
    OptimizerParamScheduler(SimpleNamespace(param_groups=[]), **{**values, "wd_incr_style": "constant", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr_warmup_steps": 8}, "take fewer --lr-warmup-iters"), ({"init_lr": 1.0}, "--lr-warmup-init must not be"),
     ({"min_lr": 1.0}, "Megatron refuses these arguments: it demands: assert self.max_lr >= self.min_lr")],
)  # fmt: skip
def test_megatrons_assertions_are_sentences(changes: dict[str, object], message: str) -> None:
    with pytest.raises(MixMoEError, match=message), one_sentence():
        scheduler(**changes)


def test_errors_of_other_code_and_of_training_are_left_alone() -> None:
    with pytest.raises(AssertionError, match="a defect"), one_sentence():
        raise AssertionError("a defect")
    with pytest.raises(AssertionError), one_sentence(is_over=lambda: True):
        scheduler(lr_warmup_steps=8)
    with pytest.raises(MixMoEError, match="must be positive, got 0"), one_sentence():
        calculate_padded_vocab_size(7, 0, 1, logging_enabled=False)
    with pytest.raises(MixMoEError, match="as it was"), one_sentence():
        raise MixMoEError("as it was")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"save": None}, "give --wandb-save-dir DIR, or --save"), ({"wandb_exp_name": ""}, "give --wandb-exp-name")],
)
def test_wandb_without_what_it_needs(fields: dict[str, object], message: str) -> None:
    values = {"wandb_project": "p", "wandb_save_dir": None, "save": "s", "wandb_exp_name": None}
    with pytest.raises(MixMoEError, match=message):
        check_loggers(SimpleNamespace(**{**values, **fields}))
    check_loggers(SimpleNamespace(wandb_project=""))
