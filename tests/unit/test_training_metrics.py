"""What the log tells about the groups equals a direct calculation; when it is told, and what each writer gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_logging

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.flops import peak_flops
from mixmoe_megatron.model.metrics import MixMoEMetricsTracker, install_metrics_tracker
from mixmoe_megatron.model.moe_layer import MixMoELayer
from mixmoe_megatron.study.training_log import read_training_log
from tests.helpers.megatron import initialize_megatron, make_config, make_layer, make_model, make_options, model_loss

LENGTH, BATCH = 7, 3


@pytest.fixture(autouse=True)
def no_other_tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    initialize_megatron()
    with monkeypatch.context() as patch:
        patch.setattr(moe_logging, "_MOE_METRICS_TRACKER", None)
        yield


def report(tracker: MixMoEMetricsTracker, iteration: int = 1, **kwargs: Any) -> tuple[dict[str, float], str]:
    """What TensorBoard gets, and the part of the log line; called as Megatron's training_log does."""
    written: dict[str, float] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: written.update({name: value}))
    line = tracker.report(
        0.5, iteration, writer=writer, force_initialize=True, track_names=["load_balancing_loss"], num_layers=4,
        moe_layer_freq=[0, 1, 0, 1], mtp_num_layers=None, pg_collection=None, total_loss_dict={}, **kwargs,
    )  # fmt: skip
    return written, line


@torch.no_grad()
def direct(layer: MixMoELayer, hidden: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """The values of one micro-batch, [S, B, H] with valid [S, B], token by token."""
    o, n, values = layer.router.options, layer.router.options.num_experts_per_group, {}
    tokens = hidden[valid]
    weight, bias = layer.router.folded()
    logits = (tokens @ weight.T + bias).split(n, dim=-1)
    for index, name in enumerate(GROUPS):
        scores = logits[index].softmax(-1)
        prob, expert = scores.max(-1)
        group = layer.experts.groups()[index]
        counts = [[len(tokens) if i == e else 0 for i in range(n)] for e in range(n)]
        outputs = torch.stack([group(tokens, counts[e], torch.ones(len(tokens))) for e in range(n)], dim=1)
        chosen = outputs[range(len(tokens)), expert] * (prob * o.resolved_expert_scale / 2)[:, None]
        share = torch.tensor([(expert == e).float().mean() for e in range(n)])
        values |= {
            f"{name}_load_balancing_loss": n * (share * scores.mean(0)).sum().item(),
            f"{name}_load_max": share.max().item(),
            f"{name}_load_entropy": -sum(s * math.log(s) for s in share.tolist() if s),
            f"{name}_load_variation": (share.var(correction=0).sqrt() / share.mean()).item(),
            f"{name}_router_prob": prob.mean().item(),
            f"{name}_output_norm": chosen.square().sum(-1).mean().sqrt().item(),
            **{f"moe/{name}_load_layer_1_expert_{e}": share[e].item() for e in range(n)},
        }
    return values | {"mt_lm_norm_ratio": values["mt_output_norm"] / values["lm_output_norm"]}


@pytest.mark.parametrize("with_padding", [False, True])
def test_values_equal_a_direct_calculation(with_padding: bool) -> None:
    layer = make_layer(make_config(make_options(moe_every=2), 2, num_layers=2, moe_aux_loss_coeff=0.3))
    tracker = install_metrics_tracker(2, [1], 4)
    hidden, padding = torch.randn(LENGTH, BATCH, 24), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 4:] = padding[2, 2:] = with_padding
    layer(hidden, padding_mask=padding)
    written, _ = report(tracker, per_layer_logging=True)
    expected = direct(layer, hidden, ~padding.T)
    layers = {f"moe/{name}_layer_1": value for name, value in expected.items() if not name.startswith("moe/")}
    assert written == pytest.approx(expected | layers, rel=1e-5)
    assert 0 < written["lm_load_variation"] != written["mt_load_variation"]


def test_means_over_layers_and_microbatches_and_what_does_not_count() -> None:
    model = make_model(make_config(make_options(moe_every=2), 2, moe_aux_loss_coeff=0.01))
    tracker = install_metrics_tracker(2, [1, 3], 4)
    model_loss(model, seed=1)
    first, _ = report(tracker, 1, per_layer_logging=True)
    for name in ("lm_load_max", "mt_load_balancing_loss", "mt_output_norm", "mt_lm_norm_ratio"):
        assert first[name] == pytest.approx((first[f"moe/{name}_layer_1"] + first[f"moe/{name}_layer_3"]) / 2)
    assert not any("layer_0" in name or "layer_2" in name for name in first)
    model.eval()
    model_loss(model, seed=3)
    with torch.no_grad():
        model.train()
        model_loss(model, seed=3)
    assert report(tracker, 2)[0] == pytest.approx({name: v for name, v in first.items() if "moe/" not in name})
    model_loss(model, seed=1)
    model_loss(model, seed=2)
    both, _ = report(tracker, 3)
    model_loss(model, seed=2)
    second, _ = report(tracker, 4)
    for name in ("lm_load_balancing_loss", "lm_router_prob", "mt_router_prob"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2)


@pytest.mark.parametrize("how", [{"recompute_method": "uniform", "recompute_num_layers": 1}, {"modules": ["moe"]}])
def test_recomputed_layers_count_once(how: dict[str, Any]) -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": how["modules"]} if "modules" in how else {
        "recompute_granularity": "full", **how}  # fmt: skip
    results = []
    for settings in ({}, recompute):
        model = make_model(make_config(make_options(moe_every=2), 2, moe_aux_loss_coeff=0.01, **settings))
        tracker = install_metrics_tracker(2, [1, 3], 4)
        model_loss(model).backward()
        assert tracker._sums is not None
        assert tracker._sums[:, :, :4].sum(-1).tolist() == [[16, 16], [16, 16]]  # 2 layers, 2 groups, 16 tokens
        results.append(report(tracker, per_layer_logging=True)[0])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_it_logs_when_megatron_does_and_keeps_the_first_step_for_the_first_interval(tmp_path) -> None:
    layer = make_layer(make_config(make_options(moe_every=2), 1, num_layers=2, moe_aux_loss_coeff=0.3))
    calls: list[Any] = []
    rates = SimpleNamespace(
        end_step=lambda: calls.append("step"),
        rates=lambda begin_interval: calls.append(begin_interval) or {"tokens_per_second": 12.5},
    )
    tracker = install_metrics_tracker(1, [1], 4, log_interval=4, rates=rates)
    lines, wandb = [], []
    writer = SimpleNamespace(log=lambda values, step: wandb.append((values, step)))
    for iteration in range(3, 9):
        layer(torch.randn(LENGTH, BATCH, 24))
        wandb.clear()
        written, line = report(tracker, iteration, wandb_writer=writer)
        lines.append(line)
        assert bool(written) == bool(line) == (iteration in (3, 4, 8))
        if written:
            assert wandb == [(written, iteration)]
    assert calls == ["step", False, "step", True, "step", "step", "step", "step", True]
    log = tmp_path / "log"
    log.write_text(f" iteration 3/ 8 | lm loss: 1.0E+00 |{lines[0]} grad norm: 1.0 |\n", "utf-8")
    curves = read_training_log(log)
    assert curves["tokens_per_second"] == [(3, 12.5)]
    assert curves["lm_load_max"][0][1] >= 0.25
    assert not any(name.startswith("mt_") for name in curves)


def test_outputs_are_exchanged_for_the_norm_in_logged_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under expert tensor parallelism; each logged norm is that of its step."""
    layer = make_layer(make_config(make_options(moe_every=2), 1, num_layers=2))
    tracker = install_metrics_tracker(1, [1], 4, log_interval=4)
    layer.experts.tp_group = SimpleNamespace(size=lambda: 2)
    exchanges: list[int] = []
    norms = {}
    for iteration in range(3, 13):
        tokens = torch.randn(LENGTH, BATCH, 24) * iteration
        with monkeypatch.context() as patch:  # both ranks hold half of the output
            patch.setattr(torch.distributed, "all_reduce", lambda t, group, i=iteration: exchanges.append(i))
            output, _ = layer(tokens)
        norms[iteration] = output.detach().square().sum(-1).mean().div(2).sqrt().item()
        written, _ = report(tracker, iteration)
        if iteration in (8, 12):
            assert written["lm_output_norm"] == pytest.approx(norms[iteration], rel=1e-5)
        assert bool(written) == (iteration in (3, 4, 8, 12))
    assert exchanges == [3, 4, 8, 12]


def test_a_pipeline_rank_without_moe_layer_has_a_part_of_the_same_size() -> None:
    tracker = install_metrics_tracker(2, [1, 3], 4)
    report(tracker)
    layer = make_layer(make_config(make_options(moe_every=2), 2, num_layers=2))
    other = install_metrics_tracker(2, [1, 3], 4)
    layer(torch.randn(LENGTH, BATCH, 24))
    assert tracker._sums is not None and other._sums is not None
    assert tracker._sums.shape == other._sums.shape and tracker._sums.dtype == other._sums.dtype
    assert "lm_load_balancing_loss" not in report(other)[0]  # no aux loss without a coefficient


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989)],
)
def test_peaks(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12
    assert peak_flops("some other device") is None
