"""A measurement of the model between training steps, which leaves training as it was.

Megatron evaluates on batches of its validation data, only with --eval-iters and not before the first step. Here a
function of the model is called then too; what follows is bit for bit what it would have been without.

Source: `megatron.training.training.train` (its block "Evaluation"), `evaluate` and `post_training_step_callbacks`, read
at megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers, training

from mixmoe_megatron.megatron_patches.wrapping import wrap

#: Called on all ranks with this rank's model chunks, in evaluation mode, and the number of steps done.
Measurement = Callable[[list[torch.nn.Module], int], None]


def measure_between_steps(measure: Measurement, interval: int) -> None:
    """Call a function before the first step, after every `interval` steps and after the last. Call before `pretrain`.

    Args:
        measure: see `Measurement`.
        interval: steps from one call to the next.
    """
    wrap(training, "train", partial(_train, measure))
    wrap(training, "post_training_step_callbacks", partial(_after_step, measure, interval))


def _train(
    measure: Measurement, train: Callable[..., Any], step: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any
) -> Any:
    if get_args().iteration == 0:
        with _training_at_rest(model, None):
            measure(model, 0)
    return train(step, model, optimizer, *rest, **kwargs)


def _after_step(
    measure: Measurement,
    interval: int,
    callbacks: Callable[..., Any],
    model: Any,
    optimizer: Any,
    scheduler: Any,
    iteration: int,
    *rest: Any,
) -> Any:
    if iteration % interval == 0 or iteration == get_args().train_iters:
        get_timers()("interval-time").stop()  # speed is that of training
        with _training_at_rest(model, optimizer):
            measure(model, iteration)
        get_timers()("interval-time").start(barrier=True)
    return callbacks(model, optimizer, scheduler, iteration, *rest)


@contextmanager
def _training_at_rest(model: Any, optimizer: Any) -> Iterator[None]:
    """No dropout, no graph, no timers, no parameters gathered as layers need them; all comes back.

    Args:
        model: this rank's chunks.
        optimizer: its new parameters are gathered first; None: there are none yet.
    """
    args, config, rerun = get_args(), get_model_config(model[0]), get_rerun_state_machine()
    timers, mode = config.timers, rerun.get_mode()
    config.timers = None
    rerun.set_mode(RerunMode.DISABLED)
    gathers_ahead = training.should_disable_forward_pre_hook(args)
    if gathers_ahead:
        training.disable_forward_pre_hook(model, optimizer=optimizer, param_sync=optimizer is not None)
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in model:
        chunk.train()
    if gathers_ahead:
        training.enable_forward_pre_hook(model)
    rerun.set_mode(mode)
    config.timers = timers
