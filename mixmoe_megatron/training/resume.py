"""Resume with the distributed optimizer where neither Transformer Engine nor Apex brings its own Adam.

Megatron's fused Adams keep the step in their parameter groups; torch's keeps it in the state of each parameter, as a
tensor. `DistributedOptimizer` of megatron-core 0.19.2 is not at home with that when it loads a checkpoint:

- `state_dict` asserts that all parameters agree on the step, and a fresh optimizer has none;
- `_set_main_param_and_optimizer_states` looks for "step" among the loaded tensors, which do not hold it;
- `load_state_dict` gives all parameters the very same step tensor, which then counts every parameter as a step and
  spoils Adam's bias correction without a word.

Source: none in the paper; found by resuming a run with megatron-core 0.19.2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer


def mend_distributed_optimizer() -> None:
    """Make Megatron's distributed optimizer resume torch's Adam. Idempotent.

    Does nothing where Megatron uses Transformer Engine's or Apex's Adam. A Megatron that fills the state, passes the
    step or copies it by itself is not disturbed: what is there is kept.
    """
    optimizer_class = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states
    if getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True) or hasattr(state_dict, "__wrapped__"):
        return

    @functools.wraps(state_dict)
    def state_dict_of_filled(self: Any) -> dict[str, Any]:
        if _is_torch_adam(self.optimizer) and not self.optimizer.state:
            _fill(self.optimizer)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, loaded: dict[str, Any]) -> None:
        load_state_dict(self, loaded)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_states_but_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        if _is_torch_adam(self.optimizer):
            tensors = {"step": None, **tensors}  # what is not a tensor is skipped
        set_states(self, model_param, tensors)

    optimizer_class.state_dict = state_dict_of_filled
    optimizer_class.load_state_dict = load_with_own_steps
    optimizer_class._set_main_param_and_optimizer_states = set_states_but_step


def _is_torch_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter (shards of any shape and dtype) what torch's Adam makes on its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
