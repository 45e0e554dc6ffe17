"""Check 1: the Mix-MoE layer on every backend against a plain reference in float64, forward and every gradient."""

from __future__ import annotations

from typing import Any

from tests.gpu.harness import DEVICE, Check, NotRun, Rows

HIDDEN, FFN, LENGTH, BATCH = 256, 512, 32, 4
FP32_TOLERANCE = 1e-5  # of the largest value of the tensor
TF32_TOLERANCE = 4e-3  # Transformer Engine multiplies float32 matrices in TF32, which keeps 10 bits
#: A grouped GEMM may sum in another order than a GEMM per expert: its error against float64 may be so much larger, and
#: up to four roundings whatever that error is (a bias of four elements can be lucky).
BF16_RATIO, BF16_ROUNDINGS = 1.5, 4 * 2.0**-8
AUX_LOSS_COEFF = 0.3
BACKENDS = ("sequential", "torch", "te")
#: name -> experts a group, tokens in the batch; the second leaves most experts empty
SHAPES = {"n 4": (4, LENGTH, BATCH), "n 8, empty experts": (8, 1, 3), "n 1": (1, LENGTH, BATCH)}


def start_megatron() -> None:
    """Start Megatron's process groups in this one process, NCCL on a GPU."""
    import torch

    from tests.helpers.megatron import initialize_megatron

    if DEVICE == "cuda" and not torch.distributed.is_initialized():
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_megatron()


def make_layer(backend: str, stage: int, n: int, dtype: Any) -> Any:
    """Return a layer on the device, its values the same for every backend."""
    import torch

    from mixmoe_megatron.model.moe_layer import MixMoELayer
    from tests.helpers.megatron import make_config, make_options, process_groups

    use_te = backend == "te"
    config = make_config(
        make_options(moe_every=2, num_experts_per_group=n),
        stage,
        num_layers=2,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        moe_aux_loss_coeff=AUX_LOSS_COEFF,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        experts_backend=backend,
        transformer_impl="transformer_engine" if use_te else "local",
        moe_grouped_gemm=True,
    )
    layer = MixMoELayer(config, pg_collection=process_groups())
    layer.set_layer_number(config.moe_layer_freq.index(1) + 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in layer.router.group_routers():
            for parameter in group.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for group in layer.experts.groups():
            for weights in (expert_weights(group, "linear_fc1"), expert_weights(group, "linear_fc2")):
                for weight in weights:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return layer.cuda() if DEVICE == "cuda" else layer


def expert_weights(group: Any, name: str) -> list[Any]:
    """The [out, in] weights of a group's experts, whichever backend holds them."""
    linear = getattr(group, name)
    if hasattr(linear, "weight0"):  # Transformer Engine
        return [getattr(linear, f"weight{index}") for index in range(linear.num_gemms)]
    return list(linear.weight.unbind())


def expert_gradients(group: Any, name: str) -> list[Any]:
    """The gradients of `expert_weights`."""
    linear = getattr(group, name)
    if hasattr(linear, "weight0"):
        return [getattr(linear, f"weight{index}").grad for index in range(linear.num_gemms)]
    return list(linear.weight.grad.unbind())


def measured(layer: Any) -> dict[str, Any]:
    """Run the layer once and return its output and the gradients of everything trained, on the CPU in float64."""
    import torch

    hidden, weight = inputs(layer)
    hidden = hidden.to(layer.config.params_dtype).to(DEVICE).requires_grad_()
    output, _ = layer(hidden)
    (output.float() * weight.to(DEVICE)).sum().backward()
    result = {"output": output, "hidden_states": hidden.grad}
    for index, (router, group) in enumerate(zip(layer.router.group_routers(), layer.experts.groups(), strict=True)):
        result |= {f"router {index} {name}": p.grad for name, p in router.named_parameters()}
        for name in ("linear_fc1", "linear_fc2"):
            result[f"experts {index} {name}"] = torch.stack(expert_gradients(group, name))
    return {name: tensor.detach().double().cpu() for name, tensor in result.items()}


def inputs(layer: Any) -> tuple[Any, Any]:
    """Hidden states [S, B, H], rounded to the layer's dtype, and the weights of the outputs in the loss; float32."""
    import torch

    generator = torch.Generator().manual_seed(7)
    shape = (*layer.tokens_shape, HIDDEN)
    hidden, weight = (torch.randn(shape, generator=generator) for _ in range(2))
    return hidden.to(layer.config.params_dtype).float(), weight


def expected(layer: Any) -> dict[str, Any]:
    """What `measured` gives in exact arithmetic: the Hugging Face block in float64 on the CPU."""
    import torch
    from torch.func import functional_call

    from mixmoe_megatron.hf.modeling_mixmoe import router_aux_loss
    from mixmoe_megatron.model.spectral import fold_router_weight
    from tests.helpers.reference import reference_block

    block, o = reference_block(layer, HIDDEN), layer.config.options()
    leaves: dict[str, Any] = {}

    def leaf(name: str, tensor: Any) -> Any:
        leaves[name] = tensor.detach().cpu().double().requires_grad_()
        return leaves[name]

    rows, biases, up, down = [], [], [], []
    for index, (router, group) in enumerate(zip(layer.router.group_routers(), layer.experts.groups(), strict=True)):
        own = {name: leaf(f"router {index} {name}", parameter) for name, parameter in router.named_parameters()}
        spectral = own.get("spectral_weight")
        rows.append(
            fold_router_weight(
                own["weight"], spectral, o.spectral_transform, o.spectral_norm, o.spectral_scale, o.spectral_seed
            ).double()
        )
        biases.append(own["bias"])
        up.append(leaf(f"experts {index} linear_fc1", torch.stack(expert_weights(group, "linear_fc1"))))
        down.append(leaf(f"experts {index} linear_fc2", torch.stack(expert_weights(group, "linear_fc2"))))
    router_values = {"weight": torch.cat(rows), "bias": torch.cat(biases)}
    values = {f"router.{name}": value for name, value in router_values.items()}
    values |= {"experts.gate_up_proj": torch.cat(up), "experts.down_proj": torch.cat(down)}
    hidden, weight = inputs(layer)
    hidden = leaf("hidden_states", hidden)
    output = functional_call(block.double(), values, (hidden,))
    logits, _, _ = functional_call(block.router, router_values, (hidden.flatten(0, 1),))
    aux = router_aux_loss((logits,), layer.stage, o.topk_per_group, None)
    loss = (output * weight).sum() + AUX_LOSS_COEFF * aux.sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(layer: Any) -> dict[str, float]:
    """The largest error of each tensor over the largest value of the tensor."""
    exact, actual = expected(layer), measured(layer)
    assert exact.keys() == actual.keys()
    result = {}
    one_expert = layer.config.num_experts_per_group == 1  # its probability is 1 whatever its router says
    for name, tensor in exact.items():
        scale, idle = tensor.abs().max().item(), one_expert and name.startswith("router")
        assert idle or scale > 1e-9, f"{name} is zero: nothing is compared"
        assert tensor.shape == actual[name].shape, name
        result[name] = (actual[name] - tensor).abs().max().item() / (1.0 if idle else scale)
        assert result[name] == result[name], f"{name} is not a number"
    return result


def run(rows: Rows) -> None:
    """Try {sequential, torch, te} x {float32, bfloat16} x both stages x the shapes."""
    import torch

    start_megatron()
    for dtype in (torch.float32, torch.bfloat16):
        for shape, (n, length, batch) in SHAPES.items():
            for stage in (1, 2):
                baseline: dict[str, float] = {}
                for backend in BACKENDS:
                    with rows.row(f"{backend}, {str(dtype)[6:]}, stage {stage}, {shape}") as facts:
                        need(backend)
                        layer = make_layer(backend, stage, n, dtype)
                        layer.tokens_shape = (length, batch)
                        found = errors(layer)
                        baseline = baseline or found
                        facts["largest_error"] = max(found.values())
                        hold(found, baseline, dtype == torch.float32, backend)
    empty_group(rows)


def need(backend: str) -> None:
    """Raise NotRun where a backend is not there."""
    from mixmoe_megatron.model.backends import HAVE_TE

    if backend == "te" and (not HAVE_TE or DEVICE == "cpu"):
        raise NotRun("Transformer Engine is not installed" if not HAVE_TE else "Transformer Engine needs a GPU")


def hold(found: dict[str, float], baseline: dict[str, float], is_float32: bool, backend: str) -> None:
    """Hold the errors to their bounds."""
    float32 = TF32_TOLERANCE if backend == "te" else FP32_TOLERANCE
    for name, error in found.items():
        bound = float32 if is_float32 else max(BF16_RATIO * baseline[name], BF16_ROUNDINGS)
        assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.2e}"


def empty_group(rows: Rows) -> None:
    """No token for a whole group, as an expert-parallel rank may see it: output and gradients of the other one."""
    import torch

    for backend in BACKENDS:
        for dtype in (torch.float32, torch.bfloat16):
            with rows.row(f"{backend}, {str(dtype)[6:]}, a group without tokens") as facts:
                need(backend)
                outputs = {}
                for name in ("sequential", backend):
                    experts = make_layer(name, 2, 4, dtype).experts
                    generator = torch.Generator().manual_seed(3)
                    hidden = torch.randn(10, HIDDEN, generator=generator).to(dtype).to(DEVICE).requires_grad_()
                    probs = torch.rand(10, generator=generator).to(DEVICE).requires_grad_()
                    counts = torch.tensor([0, 0, 0, 0, 3, 0, 5, 2])
                    output, _ = experts(hidden, counts, probs)
                    output.float().square().sum().backward()
                    outputs[name] = [output, hidden.grad, probs.grad]
                    for index, group in enumerate(experts.groups()):
                        for gradient in expert_gradients(group, "linear_fc1"):
                            assert gradient is not None, "DDP waits for the gradient of every trained parameter"
                            assert index or not gradient.any(), "the group without tokens has a gradient"
                error = max(
                    ((a - b).abs().max() / b.abs().max()).item()
                    for a, b in zip(outputs[backend], outputs["sequential"], strict=True)
                )
                facts["largest_difference"] = error
                float32 = TF32_TOLERANCE if backend == "te" else FP32_TOLERANCE
                assert error <= (float32 if dtype == torch.float32 else BF16_ROUNDINGS)


CHECKS = [Check("layer", "each backend computes the layer and all its gradients", run, on_cpu=True)]
