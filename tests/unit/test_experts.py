"""Expert groups: the backends agree with each other and with Megatron's own experts, also in their checkpoints."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.backends import LocalSpecProvider
from torch.utils._python_dispatch import TorchDispatchMode

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model import backends
from mixmoe_megatron.model.backends import choose_experts_backend
from mixmoe_megatron.model.expert_ops import weighted_swiglu
from mixmoe_megatron.model.experts import ExpertGroup, MixMoEExperts
from tests.helpers.megatron import gradients, initialize_megatron, make_config, make_options, process_groups

N, H = 4, 24
COUNTS = [[3, 0, 5, 2], [0, 0, 0, 7], [4, 4, 4, 4], [0, 0, 0, 0]]


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    initialize_megatron()


def config_for(backend: str = "auto", stage: int = 1, **settings: Any) -> Any:
    return make_config(make_options(moe_every=2), stage, experts_backend=backend, **settings)


def make_group(use_grouped_mm: bool, **settings: Any) -> ExpertGroup:
    torch.manual_seed(3)
    return ExpertGroup(N, config_for(**settings), process_groups(), use_grouped_mm)


def make_experts(backend: str, stage: int = 2, **settings: Any) -> MixMoEExperts:
    torch.manual_seed(3)
    return MixMoEExperts(N * stage, config_for(backend, stage, **settings), pg_collection=process_groups())


def run(module: Any, counts: list[int], *, as_tensor: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output and all gradients, those of the inputs included."""
    torch.manual_seed(7)
    hidden = torch.randn(sum(counts), H, requires_grad=True)
    probs = torch.rand(sum(counts), requires_grad=True)
    weight = torch.randn(sum(counts), H)
    outputs = []

    def loss() -> torch.Tensor:
        output = module(hidden, torch.tensor(counts) if as_tensor else counts, probs)
        outputs.append(output[0] if isinstance(output, tuple) else output)
        return (outputs[-1] * weight).sum()

    result = gradients(module, loss)
    return outputs[-1], {**result, "hidden": hidden.grad, "probs": probs.grad}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_equals_sequential(counts: list[int]) -> None:
    assert_same(run(make_group(True), counts), run(make_group(False), counts))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("backend", ["torch", "sequential"])
def test_two_groups_equal_each_on_its_own(backend: str, counts: list[int]) -> None:
    experts = make_experts(backend)
    output, grads = run(experts, [*counts, *counts[::-1]], as_tensor=True)
    torch.manual_seed(7)
    hidden, probs = torch.randn(2 * sum(counts), H), torch.rand(2 * sum(counts))
    halves = zip(experts.groups(), hidden.chunk(2), [counts, counts[::-1]], probs.chunk(2), strict=True)
    if sum(counts):
        torch.testing.assert_close(output, torch.cat([group(*rest) for group, *rest in halves]), rtol=1e-5, atol=1e-5)
    assert all(name in grads for name, _ in experts.named_parameters()), "DDP waits for every parameter"


@pytest.mark.parametrize("backend", ["torch", "sequential"])
def test_a_gradient_that_is_not_contiguous(backend: str) -> None:
    experts, counts = make_experts(backend, stage=1), [3, 0, 5, 2]
    hidden = torch.randn(10, H, requires_grad=True)
    experts(hidden, torch.tensor(counts), torch.rand(10))[0].sum().backward()
    assert hidden.grad.abs().max() > 0


def stock_experts(group: ExpertGroup) -> torch.nn.Module:
    """Megatron's SequentialMLP with the group's weights."""
    stock = LocalSpecProvider().grouped_mlp_modules(False)(N, group.config, pg_collection=process_groups())
    with torch.no_grad():
        for index, expert in enumerate(stock.local_experts):
            expert.linear_fc1.weight.copy_(group.linear_fc1.weight[index])
            expert.linear_fc2.weight.copy_(group.linear_fc2.weight[index])
    return stock


@pytest.mark.parametrize("use_grouped_mm", [True, False])
def test_group_equals_megatrons_sequential_mlp(use_grouped_mm: bool) -> None:
    group, counts = make_group(use_grouped_mm), [3, 1, 5, 2]
    stock = stock_experts(group)
    output, grads = run(group, counts)
    expected, stock_grads = run(stock, counts, as_tensor=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for name in ("hidden", "probs"):
        torch.testing.assert_close(grads[name], stock_grads[name], rtol=1e-4, atol=1e-5)
    for layer in ("linear_fc1", "linear_fc2"):
        stacked = torch.stack([stock_grads[f"local_experts.{i}.{layer}.weight"] for i in range(N)])
        torch.testing.assert_close(grads[f"{layer}.weight"], stacked, rtol=1e-4, atol=1e-5)


class CountMatrixProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_grouped_mm" in str(func) or str(func).startswith(("aten.mm", "aten.addmm"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_grouped_mm", [True, False])
def test_a_frozen_group_computes_no_weight_gradient(use_grouped_mm: bool) -> None:
    counts = []
    for frozen in (False, True):
        group = make_group(use_grouped_mm).requires_grad_(not frozen)
        with CountMatrixProducts() as products:
            _, grads = run(group, [3, 1, 5, 2])
        counts.append(products.count)
        assert ("linear_fc1.weight" in grads) != frozen and grads["hidden"] is not None
    per_layer = 1 if use_grouped_mm else N
    assert counts == [3 * 2 * per_layer, 2 * 2 * per_layer], "forward, input gradient and, if trained, weight gradient"


@pytest.mark.parametrize("use_grouped_mm", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_activation_recomputation_changes_nothing(counts: list[int], use_grouped_mm: bool) -> None:
    settings = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    assert_same(run(make_group(use_grouped_mm, **settings), counts), run(make_group(use_grouped_mm), counts))


@pytest.mark.parametrize("use_grouped_mm", [True, False])
def test_activation_recomputation_keeps_no_activation(use_grouped_mm: bool) -> None:
    """After the forward pass nobody but the test holds the memory of the [T, F] activation."""
    held = []
    for settings in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}):
        group = make_group(use_grouped_mm, **settings)
        storages = []

        def watched(*args: Any, group: Any = group, storages: Any = storages) -> torch.Tensor:
            result = ExpertGroup._activation(group, *args)
            storages.append(result.untyped_storage())
            return result

        group._activation = watched
        output = group(torch.randn(10, H, requires_grad=True), [3, 0, 5, 2], torch.rand(10))
        held.append(torch._C._storage_Use_Count(storages[0]._cdata) > 1)
        del output
    assert held == [True, False]


class FakeGroup:
    """A process group of another world, for code that only asks for rank and size."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def group_of_rank(ep: int, tp: int, ep_rank: int, tp_rank: int) -> ExpertGroup:
    torch.manual_seed(3)
    groups: Any = SimpleNamespace(ep=FakeGroup(ep_rank, ep), expt_tp=FakeGroup(tp_rank, tp), expt_dp=FakeGroup(0, 1))
    dense_tp = tp if tp < 3 else 1
    settings = {
        "expert_model_parallel_size": ep,
        "tensor_model_parallel_size": dense_tp,
        "sequence_parallel": dense_tp > 1,
    }
    return ExpertGroup(N // ep, config_for(expert_tensor_parallel_size=tp, **settings), groups, False)


def stored_tensors(group: Any, own_keys: bool, prefix: str = "lm_experts.") -> list[ShardedTensor]:
    metadata = {"singleton_local_shards": own_keys}
    state = group.sharded_state_dict(prefix, (), metadata)
    apply_factories(state)
    entries = [entry for value in state.values() for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in entries if isinstance(entry, ShardedTensor)]


def assembled(groups: list[ExpertGroup], own_keys: bool) -> dict[str, torch.Tensor]:
    """The global tensors that all ranks' pieces make up."""
    result: dict[str, torch.Tensor] = {}
    for piece in itertools.chain.from_iterable(stored_tensors(group, own_keys) for group in groups):
        full = result.setdefault(piece.key, torch.full(piece.global_shape, float("nan")))
        data = piece.data.view(*[1] * (full.dim() - piece.data.dim()), *piece.data.shape)
        full[tuple(slice(o, o + s) for o, s in zip(piece.global_offset, data.shape, strict=True))] = data
    return result


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2), (2, 2), (4, 3)])
def test_neither_weights_nor_checkpoint_depend_on_the_parallel_sizes(ep: int, tp: int, own_keys: bool) -> None:
    whole = assembled([group_of_rank(1, 1, 0, 0)], own_keys)
    ranks = [group_of_rank(ep, tp, r, t) for r in range(ep) for t in range(tp)]
    split = assembled(ranks, own_keys)
    assert whole.keys() == split.keys()
    for key in whole:
        assert torch.equal(whole[key], split[key]), key


@pytest.mark.parametrize("own_keys", [False, True])
def test_checkpoint_keys_and_shapes_are_megatrons(own_keys: bool) -> None:
    group = make_group(True)
    ours, stock = ({t.key: t.global_shape for t in stored_tensors(g, own_keys)} for g in (group, stock_experts(group)))
    assert ours == stock


@pytest.mark.parametrize("own_keys", [False, True])
def test_megatrons_experts_load_our_checkpoint_and_we_theirs(own_keys: bool, tmp_path: Any) -> None:
    group, metadata = make_group(True), {"singleton_local_shards": own_keys}
    stock, other = stock_experts(group), make_group(False)
    expected = {name: p.clone() for name, p in group.named_parameters()}
    dist_checkpointing.save(group.sharded_state_dict("x.", (), dict(metadata)), str(tmp_path))
    with torch.no_grad():
        for parameter in [*stock.parameters(), *other.parameters()]:
            parameter.zero_()

    loaded = dist_checkpointing.load(stock.sharded_state_dict("x.", (), dict(metadata)), str(tmp_path))
    stock.load_state_dict({k.removeprefix("x."): v for k, v in loaded.items() if "_extra_state" not in k}, strict=False)
    for layer in ("linear_fc1", "linear_fc2"):
        weights = torch.stack([getattr(expert, layer).weight for expert in stock.local_experts])
        assert torch.equal(weights, expected[f"{layer}.weight"])

    (tmp_path / "stock").mkdir()
    dist_checkpointing.save(stock.sharded_state_dict("x.", (), dict(metadata)), str(tmp_path / "stock"))
    loaded = dist_checkpointing.load(other.sharded_state_dict("x.", (), dict(metadata)), str(tmp_path / "stock"))
    other.load_state_dict({k.removeprefix("x."): v for k, v in loaded.items()})
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


def test_marks_for_the_optimizer() -> None:
    weight = group_of_rank(2, 2, 0, 0).linear_fc2.weight
    assert (weight.tensor_model_parallel, weight.partition_dim) == (True, 2)


def test_experts_are_expert_parallel_in_one_process_too() -> None:
    """Megatron's optimizer then has an expert part under every layout, and its state loads under any other."""
    assert not any(weight.allreduce for weight in make_experts("torch").parameters())


MISFIT = "moe_ffn_hidden_size per rank=11 is not a multiple of 4"
LOOP = "is a loop that waits for the GPU in {} on compute capability {}"
WRONG = "wrong gradients on compute capability 10.0"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype", "num_per_group", "settings", "backend", "why"),
    [
        (None, FP32, N, {}, "sequential", "a loop on a CPU"),
        (None, BF16, N, {}, "sequential", "a loop on a CPU"),
        ((8, 0), BF16, N, {}, "sequential", LOOP.format("bfloat16", "8.0")),
        ((8, 9), BF16, N, {}, "sequential", LOOP.format("bfloat16", "8.9")),
        ((9, 0), FP32, N, {}, "sequential", LOOP.format("float32", "9.0")),
        ((9, 0), FP16, N, {}, "sequential", LOOP.format("float16", "9.0")),
        ((9, 0), BF16, N, {}, "torch", "one kernel"),
        ((9, 0), BF16, 1, {}, "sequential", "a plain GEMM"),
        ((9, 0), FP32, N, {"ffn_hidden_size": 44}, "sequential", MISFIT),
        ((10, 0), BF16, N, {}, "sequential", WRONG),
        ((9, 0), BF16, N, {"transformer_impl": "transformer_engine"}, "te", "Transformer Engine is there"),
    ],
)
def test_automatic_choice(
    capability: Any, dtype: Any, num_per_group: int, settings: Any, backend: str, why: str, monkeypatch: Any
) -> None:
    told = []
    monkeypatch.setattr(backends, "cuda_capability", lambda: capability)
    monkeypatch.setattr(backends, "_log_once", lambda *words: told.append(words))
    monkeypatch.setattr(backends, "HAVE_TE", True)
    config = config_for(params_dtype=dtype, ffn_hidden_size=settings.get("ffn_hidden_size", 64))
    config.transformer_impl = settings.get("transformer_impl", "local")
    assert choose_experts_backend(config, num_per_group) == backend
    assert [name for name, _ in told] == [backend]
    assert why in told[0][1]


def test_a_backend_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_experts_backend(config_for("sequential"), N) == "sequential"
    assert choose_experts_backend(config_for("torch"), N) == "torch"
    with pytest.raises(MixMoEError, match=MISFIT):
        choose_experts_backend(config_for("torch", ffn_hidden_size=44), N)
    with pytest.raises(MixMoEError, match="needs Transformer Engine, which is not installed"):
        choose_experts_backend(config_for("te"), N)
    config = config_for()
    config.fp8 = "hybrid"
    with pytest.raises(MixMoEError, match="fp8 needs experts_backend=te"):
        choose_experts_backend(config, N)
    monkeypatch.setattr(backends, "cuda_capability", lambda: (10, 0))
    with pytest.raises(MixMoEError, match=f"{WRONG} .use auto or sequential."):
        choose_experts_backend(config_for("torch", params_dtype=BF16), N)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_once.cache_clear()
    with caplog.at_level("INFO", logger="mixmoe_megatron.model.backends"):
        make_experts("torch")
        make_experts("torch")
    assert [record.message for record in caplog.records] == ["Mix-MoE experts run on the backend torch: asked for."]


def test_te_groups_are_megatrons_grouped_mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Transformer Engine the structure is checked: one TEGroupedMLP per group, called as by Megatron."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    built, called = [], []

    class GroupedMLP(torch.nn.Module):
        def __init__(self, n: int, config: Any, pg_collection: Any, name: str) -> None:
            super().__init__()
            built.append((n, name))

        def forward(self, hidden: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> Any:
            called.append(counts.tolist())
            return 2 * hidden, None

    spec = SimpleNamespace(grouped_mlp_modules=lambda grouped: GroupedMLP)
    monkeypatch.setattr(provider, "TESpecProvider", lambda: spec)
    monkeypatch.setattr("mixmoe_megatron.model.experts.choose_experts_backend", lambda config, n: "te")
    experts = MixMoEExperts(8, config_for(stage=2), pg_collection=process_groups(), name="mlp.experts")
    hidden = torch.randn(10, H)
    output, bias = experts(hidden, torch.tensor([1, 2, 0, 0, 3, 4, 0, 0]), torch.rand(10))
    assert torch.equal(output, 2 * hidden) and bias is None
    assert built == [(4, "mlp.experts.lm_experts"), (4, "mlp.experts.mt_experts")]
    assert called == [[1, 2, 0, 0], [3, 4, 0, 0]]


def plain_swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)


class Results(TorchDispatchMode):
    """The tensors that operations return while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [result] if torch.is_tensor(result) else []
        return result


def swiglu_results(function: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], Results]:
    """Output and gradients; what the graph keeps; what was computed."""
    torch.manual_seed(1)
    gate_up, probs = torch.randn(64, 256).to(dtype).requires_grad_(), torch.rand(64).requires_grad_()
    grad, kept = torch.randn(64, 128).to(dtype), []
    with Results() as computed, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = function(gate_up, probs)
        output.backward(grad)
    return [output.detach(), gate_up.grad, probs.grad], kept, computed


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_weighted_swiglu(fused: bool, dtype: torch.dtype) -> None:
    expected, _, _ = swiglu_results(plain_swiglu, dtype)
    with torch.compiler.set_stance("force_eager"):  # Megatron's kernel without a compiler
        results, kept, computed = swiglu_results(lambda *inputs: weighted_swiglu(*inputs, fused=fused), dtype)
    assert torch.equal(results[0], expected[0])
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        tolerance = 1e-6 if dtype is FP32 else 2.0**-7
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
    assert sum(tensor.numel() for tensor in kept) == 64 * 256 + 64, "the graph keeps the inputs alone"
    if not fused:  # the compiler fuses what Megatron's function computes in float32
        assert {tensor.dtype for tensor in computed.tensors if tensor.numel() >= 64 * 128} == {dtype}


def test_the_fused_activation_is_used_where_megatron_would(monkeypatch: pytest.MonkeyPatch) -> None:
    target, calls = "mixmoe_megatron.model.experts.weighted_swiglu", []
    monkeypatch.setattr(target, lambda x, p, fused: calls.append(fused) or x[:, ::2])
    for fused in (True, False):
        run(make_group(False, bias_activation_fusion=fused), [3, 1, 5, 2])
    assert calls == [True, False]
