"""In a training step this project's code never makes the host wait for the device (forward, loss, backward, metrics).

The device is torch's meta device, whose tensors have no values. What Megatron asks of it is stood in for: the numbers
of tokens that its dispatcher brings to the host once a layer, and its check that the loss is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_logging, token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.training import training

from mixmoe_megatron.data.packing import collate_packs
from mixmoe_megatron.data.parallel import collate
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.freezing import freeze_for_phase
from mixmoe_megatron.model.metrics import install_metrics_tracker
from mixmoe_megatron.training import step
from tests.helpers.host_syncs import HostSync, refused_syncs
from tests.helpers.megatron import VOCAB_SIZE, initialize_megatron, make_config, make_model, make_options
from tests.parity.test_packing_parity import documents

LENGTHS = (9, 2, 5, 7)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(autouse=True)
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    initialize_megatron()
    monkeypatch.setattr(moe_logging, "_MOE_METRICS_TRACKER", None)
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", torch.zeros(2, dtype=torch.float64, device="meta"))
    scale = torch.ones(1, device="meta")  # Megatron's schedules set it
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)


def monolingual() -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (4, 8))
    positions = torch.arange(8).repeat(4, 1)
    return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(4, 8), "position_ids": positions}


#: name -> (stage, micro-batch, --pack, settings of the model)
BATCHES: dict[str, tuple[int, Callable[[], dict[str, torch.Tensor]], bool, dict[str, Any]]] = {
    "stage 1": (1, monolingual, False, {}),
    "stage 2, padded": (2, lambda: collate(documents(LENGTHS), pad_id=0, pad_multiple=8), False, {}),
    "stage 2, no padding": (2, lambda: collate(documents((8, 8)), pad_id=0), False, {}),
    "stage 2, packed": (2, lambda: collate_packs(documents(LENGTHS), pad_id=0, pad_multiple=32), True, {}),
    "stage 2, padded, recompute": (2, lambda: collate(documents(LENGTHS), pad_id=0, pad_multiple=8), False, FULL),
}


def evenly_spread(rows: int, counts: Any, **kwargs: Any) -> Any:
    """What Megatron's dispatcher brings to the host: counts of tokens, here as many for each expert."""
    return torch.full(counts.shape, rows // counts.numel()) if torch.is_tensor(counts) else counts


def arguments(batch: dict[str, torch.Tensor], pack: bool) -> SimpleNamespace:
    return SimpleNamespace(
        pack=pack, transformer_impl="local", sequence_parallel=False, context_parallel_size=1,
        calculate_per_token_loss=False, check_for_nan_in_loss_and_grad=True,
        dataloader_type="external" if "padding_mask" in batch else "single",
    )  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage, make_batch, pack, settings = BATCHES[name]
    batch = make_batch()
    dtype = {"bf16": True, "params_dtype": torch.bfloat16}
    model = make_model(make_config(make_options(moe_every=2), stage, moe_aux_loss_coeff=0.1, **dtype, **settings))
    freeze_for_phase(model.train().to("meta"), phase_of_stage(stage))
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to("meta")  # Megatron moves it once
    install_metrics_tracker(stage, [1, 3], model.config.num_experts_per_group)
    checked: list[torch.Tensor] = []
    check = SimpleNamespace(validate_result=lambda result, rejection_func, **_: checked.append(rejection_func(result)))
    timers = SimpleNamespace(start=lambda: None, stop=lambda: None)
    rows = batch["tokens"].numel() * stage * make_options().topk_per_group
    monkeypatch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", partial(evenly_spread, rows))
    monkeypatch.setattr(step, "get_args", lambda: arguments(batch, pack))
    monkeypatch.setattr(step, "get_timers", lambda: lambda *_, **__: timers)
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: check)
    with refused_syncs():
        output, loss_of = step.forward_step(iter([batch]), model)
        loss, num_tokens, report = loss_of(output)
        loss.backward()
    results = [loss, num_tokens, report["lm loss"], checked[0]]
    assert all(value.is_meta for value in results), "all is left on the device"
    trained = [parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(trained)


def test_bounds_of_documents_go_where_they_are_read() -> None:
    """Transformer Engine's kernels read them on the device; the local modules on the host, where it costs no wait."""
    bounds = step.document_bounds(torch.tensor([[0, 1, 2, 0, 1]]))
    with refused_syncs():
        assert step.packed_documents(bounds, on_device=True).cu_seqlens_q.is_meta
        assert step.packed_documents(bounds, on_device=False).cu_seqlens_q.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    "wait",
    [lambda x: bool(x.any()), lambda x: int(x.max()), lambda x: x.sum().item(), lambda x: x.nonzero(),
     lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: x.cpu(),
     lambda x: torch.equal(x, x), lambda x: torch.repeat_interleave(x), lambda x: x.tolist(),
     lambda x: torch.zeros(3).copy_(x), lambda x: x.copy_(torch.zeros(3)), lambda x: torch.zeros(3).to(x.device),
     lambda x: torch.zeros(3).cuda(), lambda x: torch.tensor([1, 2, 3], device="cuda")],
)  # fmt: skip
def test_what_counts_as_a_wait(wait: Callable[[torch.Tensor], Any]) -> None:
    x = torch.zeros(3, device="meta")
    with refused_syncs(), pytest.raises(HostSync):
        wait(x)


def test_what_does_not() -> None:
    x = torch.zeros(3, device="meta")
    with refused_syncs():
        x[x > 0] = 0
        x[0] = 1
        assert x[torch.zeros(2, dtype=torch.int64, device="cuda")].is_meta
        assert torch.zeros(3).cuda(non_blocking=True).is_meta and torch.full((3,), 2.0, device="cuda").is_meta
        assert torch.zeros(3).sum().item() == 0 and torch.tensor([0, 3]).nonzero().tolist() == [[1]]
