"""The optimizer's step and rates in checkpoints: right for torch's Adam, without parameters, with another --lr.

Megatron's fused Adams (Transformer Engine, Apex) keep the step in their parameter groups; torch's keeps it in the state
of each parameter, as a tensor. megatron-core 0.19.2 takes the step that it saves from rank 0, and is not at home with

- a rank without a trainable parameter, such as a pipeline stage that holds no MoE layer: neither Adam has a step there.
  When it is rank 0, a resumed run begins to count at 1 again (fused Adams), or stops with a KeyError (torch's);
- torch's Adam in the distributed optimizer: `state_dict` asserts that all parameters agree on the step, and a fresh
  optimizer has none; `_set_main_param_and_optimizer_states` looks for "step" among the loaded tensors, which do not
  hold it; `load_state_dict` gives all parameters the very same step tensor, which then counts every parameter as a
  step and spoils Adam's bias correction without a word.

It also tells parameter groups by their learning rates: a run that goes on with another --lr (which
--override-opt-param-scheduler is for) finds no group of its own in the checkpoint, and stops.

Source: `megatron.core.optimizer`, its `MegatronOptimizer` and `DistributedOptimizer`; found by resuming runs with
megatron-core 0.19.2. A Megatron that counts, fills or copies by itself is not disturbed: what is there is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixmoe_megatron.megatron_patches.wrapping import wrap

_RATES = ("max_lr", "min_lr")
Groups = list[dict[str, Any]]


def mend_optimizers() -> None:
    """Make Megatron's optimizers save and load the step, whatever Adam they wrap and wherever the parameters are.

    Call it after `use_torch_kernels`. Where Megatron uses a fused Adam, only ranks without parameters are touched.
    """
    _count_steps()
    wrap(MegatronOptimizer, "_filter_and_reorder_param_groups", _filter_groups)
    wrap(distrib_optimizer.DistributedOptimizer, "load_state_dict", _load_state_dict)
    if not getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True):
        wrap(MegatronOptimizer, "_extract_common_per_param_step", _common_step)
        wrap(distrib_optimizer.DistributedOptimizer, "state_dict", _state_dict)
        wrap(distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_states)


def _filter_groups(filter_groups: Callable[..., Groups], current: Groups, saved: Groups) -> Groups:
    """Find a saved group by all that tells groups apart but its rates."""
    return filter_groups(current, _with_rates_of(current, saved))


def _load_state_dict(load_state_dict: Callable[..., None], self: Any, loaded: dict[str, Any]) -> None:
    """Find saved groups as `_filter_groups` does, and give each parameter of torch's Adam a step of its own."""
    groups = loaded["optimizer"]["param_groups"]
    loaded["optimizer"]["param_groups"] = _with_rates_of(self.optimizer.param_groups, groups)
    load_state_dict(self, loaded)
    if _is_torch_adam(self.optimizer):
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def _with_rates_of(current: Groups, saved: Groups) -> Groups:
    """Give saved parameter groups the learning rates of the current ones that are like them in all else, in order."""
    like: dict[tuple[Any, ...], Groups] = {}
    for group in current:
        like.setdefault(_identity(group), []).append(group)
    result = []
    for group in saved:
        twins = like.get(_identity(group))
        twin = twins.pop(0) if twins else group
        result.append({**group, **{rate: twin[rate] for rate in _RATES if rate in twin}})
    return result


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """What Megatron tells a group by, its rates left out."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys if key not in _RATES)


@functools.cache  # a second hook would count twice
def _count_steps() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count the step in the groups in which Adam does not count it itself."""
    for group in optimizer.param_groups:
        if _is_torch_adam(optimizer) or not group["params"]:
            group["step"] = group.get("step", 0) + 1


def _counted_step(groups: Groups) -> int:
    return max((group.get("step", 0) for group in groups), default=0)


def _common_step(extract: Callable[..., Any], state_dict: dict[str, Any]) -> Any:
    """Let a rank without parameters save the step of torch's Adam, which Megatron reads from a parameter's state."""
    step, groups = extract(state_dict), state_dict["param_groups"]
    nothing_here = not any(group["params"] for group in groups)
    counted = _counted_step(groups)
    return torch.tensor(float(counted)) if step is None and nothing_here and counted else step


def _state_dict(state_dict: Callable[..., dict[str, Any]], self: Any) -> dict[str, Any]:
    """Let a fresh torch Adam have a step to save."""
    if not _is_torch_adam(self.optimizer) or self.optimizer.state:
        return state_dict(self)
    _fill(self.optimizer)
    try:
        return state_dict(self)
    finally:
        self.optimizer.state.pop(None, None)


def _set_states(
    set_states: Callable[..., None], self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]
) -> None:
    """Let Megatron look for the step of torch's Adam among the loaded tensors in vain: it skips what is no tensor."""
    set_states(self, model_param, {"step": None, **tensors} if _is_torch_adam(self.optimizer) else tensors)


def _is_torch_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _fill(optimizer: Any) -> None:
    """Give each parameter (shards of any shape and dtype) what torch's Adam makes on its first step.

    An optimizer without parameters gets a state of no parameter (key None), which tells its counted step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    if not optimizer.state:
        optimizer.state[None] = {"step": torch.tensor(float(_counted_step(optimizer.param_groups)))}
