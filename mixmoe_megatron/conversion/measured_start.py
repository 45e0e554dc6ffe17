"""What upcycling costs on the user's own text before any training, and which start costs less.

The experts of a Mix-MoE layer compute a part of the FFN that they were cut from. Which layers are chosen, and which
neurons an expert gets, decides how much of the dense model is left: a table says so, and goes into the metadata.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmoe_megatron.checkpoint.stored import whole
from mixmoe_megatron.conversion.exported import mixmoe_config
from mixmoe_megatron.conversion.hf_import import ImportRequest, prepare_import, read_hf_model
from mixmoe_megatron.conversion.regrouped import RegroupedFFN
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.options import MixMoEOptions, resolve_moe_layers
from mixmoe_megatron.model.router_rows import folded_router
from mixmoe_megatron.model.upcycling import important_neurons

if TYPE_CHECKING:
    from mixmoe_megatron.conversion.prepared import PreparedCheckpoint
    from mixmoe_megatron.evaluation.ffn_costs import FFNCosts
    from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock

#: The options that a user who gives text, and says no other, upcycles with.
MEASURED_OPTIONS: dict[str, Any] = {"expert_init": "important", "moe_layer_placement": "measured"}
#: Where a start multiplies the perplexity by more than that, these are tried beside it.
WARN_ABOVE = 1.5
ALTERNATIVES = (MEASURED_OPTIONS, {**MEASURED_OPTIONS, "expert_init": "copy"})
#: What the table of starts does not say (examples/LOG.md, make real on a CPU without bfloat16).
CAVEAT = (
    "Perplexity does not tell what translation loses: slices at 1.07 times the base's have translated much worse. "
    "--expert-init copy starts next to the base, with n times the parameters of these FFNs."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartRow:
    """What one start costs.

    Attributes:
        start: the options that tell it from others.
        layers: the MoE layers.
        perplexity: on each text, by name.
        factor: how many times the dense model's perplexity that is, the geometric mean over the texts.
    """

    start: str
    layers: list[int]
    perplexity: dict[str, float]
    factor: float


@dataclass(frozen=True)
class MeasuredStart:
    """What was measured.

    Attributes:
        request: the conversion that was asked for, with layers and neurons settled and a record for the metadata.
        table: of the starts, dense first, in Markdown.
        caveat: what the table does not say of slices; empty for copies.
        warning: what a start above WARN_ABOVE costs, and what costs less; empty for others.
    """

    request: ImportRequest
    table: str
    caveat: str
    warning: str


def measure_start(request: ImportRequest, files: Sequence[str | Path]) -> MeasuredStart:
    """Measure the dense model, what it becomes, and, if that is much worse, what it could become.

    Args:
        request: to upcycle a dense model.
        files: text, one a line; of the first lines of each some are measured, and the start is fitted to others
            (ffn_costs.split_text).

    Raises:
        MixMoEError: a file holds no text or has another one's name, there is no line to fit to, or the model cannot
            be loaded or upcycled.
    """
    asked = request.options
    assert asked is not None
    settled: dict[str, Any] = {"moe_layer_placement": "last"} if asked.moe_layer_placement == "measured" else {}
    settled |= {"expert_init": "slice"} if asked.expert_init == "important" else {}
    prepare_import(replace(request, options=replace(asked, **settled)))  # mistakes are told before minutes of work
    meter = _StartMeter(request, files)
    chosen = meter.settle(asked)
    rows, warning = [meter.dense, meter.row(asked, chosen)], ""
    if (factor := rows[-1].factor) > WARN_ABOVE:
        others = [replace(asked, **changes) for changes in ALTERNATIVES]
        rows += [meter.row(options, meter.settle(options)) for options in others if options != asked]
        less = [f"{row.factor:.2f} with {row.start}" for row in rows[2:] if row.factor < factor]
        others_cost = ", ".join(less) or "no other start that was tried costs less"
        warning = f"this start multiplies the perplexity by {factor:.2f} before any training; {others_cost}."
        logger.warning(warning)
    record = {
        "tokens": meter.tokens,
        "starts": [asdict(row) for row in rows],
        "factor_without_ffn": meter.costs.factors() if "costs" in vars(meter) else None,
    }
    caveat = "" if asked.expert_init == "copy" else CAVEAT
    return MeasuredStart(replace(chosen, measured=record), start_table(rows), caveat, warning)


class _StartMeter:
    """A dense model in memory, which becomes one start after the other, and the texts that it is measured on."""

    def __init__(self, request: ImportRequest, files: Sequence[str | Path]) -> None:
        from mixmoe_megatron.dtypes import AUTO, choose
        from mixmoe_megatron.evaluation.ffn_costs import ENOUGH_BYTES, measure_each, split_text
        from mixmoe_megatron.evaluation.models import load_model
        from mixmoe_megatron.evaluation.segments import read_monolingual

        self._request = request
        lines: dict[str, list[str]] = {}
        for file in files:
            if (name := Path(file).name) in lines:
                raise MixMoEError(f"--measure: two files are called {name}: give them different names.")
            lines[name] = read_monolingual(file, max_bytes=ENOUGH_BYTES)
        dtype, device = choose(AUTO, AUTO)
        self._loaded = load_model("dense", request.hf_dir, dtype=dtype, device=device)
        split = {name: split_text(self._loaded, found) for name, found in lines.items()}
        self._texts = {name: measured for name, (measured, _) in split.items()}
        self._fitted = {name: fitted for name, (_, fitted) in split.items()}
        self._dense = measure_each(self._loaded, self._texts)
        self.tokens = {name: found.tokens for name, found in self._dense.items()}
        self.dense = StartRow("dense", [], {name: found.perplexity for name, found in self._dense.items()}, 1.0)

    @cached_property
    def costs(self) -> FFNCosts:
        """What each FFN is worth: measured once, when it is asked for."""
        from mixmoe_megatron.evaluation.ffn_costs import measure_ffn_costs

        return measure_ffn_costs(self._loaded, self._texts)

    @cached_property
    def importance(self) -> list[Any]:
        """What each neuron of each layer is worth: measured once, when it is asked for."""
        from mixmoe_megatron.evaluation.ffn_costs import measure_importance

        if empty := [name for name, lines in self._fitted.items() if not lines]:
            raise MixMoEError(
                f"--measure {empty[0]}: one line is not enough, since what is chosen on some lines is measured on "
                "others: give a hundred, or --expert-init slice or copy."
            )
        return measure_importance(self._loaded, self._fitted)

    def settle(self, options: MixMoEOptions) -> ImportRequest:
        """Return the request with these options, measured layers and FFNs put in."""
        num_layers = len(self._loaded.model.model.layers)
        if options.moe_layer_placement == "measured":
            count = len(resolve_moe_layers(replace(options, moe_layer_placement="last"), num_layers))
            layers = ",".join(map(str, self.costs.cheapest_layers(count)))
            options = replace(options, moe_layer_placement=layers)
        is_fitted = options.expert_init == "important"
        ffns = self._fit(resolve_moe_layers(options, num_layers), options.num_experts_per_group) if is_fitted else None
        return replace(self._request, options=options, ffns=ffns)

    def _fit(self, layers: Sequence[int], num_experts: int) -> dict[int, RegroupedFFN]:
        """Deal the neurons of some layers out to experts, and fit the down projections to what is left out."""
        from mixmoe_megatron.evaluation.ffn_costs import fit_down_projections

        neurons = {layer: important_neurons(self.importance[layer], num_experts) for layer in layers}
        down = fit_down_projections(self._loaded, self._fitted, neurons, num_experts)
        return {layer: RegroupedFFN(neurons[layer], down[layer]) for layer in layers}

    def row(self, asked: MixMoEOptions, settled: ImportRequest) -> StartRow:
        """Measure the start of a settled request."""
        from mixmoe_megatron.evaluation.ffn_costs import mean_factor, measure_each

        prepared = read_hf_model(settled)
        start = f"--expert-init {asked.expert_init} --moe-layer-placement {asked.moe_layer_placement}"
        with _upcycled(self._loaded.model, prepared):
            found = measure_each(replace(self._loaded, name=f"upcycled ({start})"), self._texts)
        perplexity = {name: one.perplexity for name, one in found.items()}
        return StartRow(start, list(prepared.model.sizes.moe_layers), perplexity, mean_factor(found, self._dense))


@contextmanager
def _upcycled(model: Any, prepared: PreparedCheckpoint) -> Iterator[None]:
    """Put the planned experts and routers in the place of a dense Hugging Face model's FFNs, for a while."""
    layers = model.model.layers
    dense = {number: layers[number].mlp for number in prepared.model.sizes.moe_layers}
    try:
        for number, mlp in dense.items():
            weight = mlp.down_proj.weight
            block = _block(prepared, number).to(weight.device)
            block.experts.to(weight.dtype)
            layers[number].mlp = block
        yield
    finally:
        for number, mlp in dense.items():
            layers[number].mlp = mlp


def _block(prepared: PreparedCheckpoint, layer: int) -> MixMoEBlock:
    """Return a Mix-MoE layer of the plan as the Hugging Face model has it, in float32."""
    import torch

    from mixmoe_megatron.hf import MixMoEConfig
    from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock

    model, prefix = prepared.model, f"decoder.layers.{layer}.mlp."
    assert model.options is not None
    values = {
        tensor.name.removeprefix(prefix): tensor.part(whole(tensor.shape)).float()
        for tensor in prepared.plan
        if tensor.name.startswith(prefix)
    }
    routers = [values[name].numpy() for name in ("router.lm.weight", "router.lm.spectral_weight") if name in values]
    fc1, fc2 = (
        torch.cat([values[f"experts.{block}.experts.{name}.weight"] for block in model.sizes.blocks()])
        for name in ("linear_fc1", "linear_fc2")
    )
    state = {
        "router.weight": torch.from_numpy(folded_router(routers, model.options)),
        "experts.gate_up_proj": fc1,
        "experts.down_proj": fc2,
    }
    if model.options.router_bias:
        state["router.bias"] = values["router.lm.bias"]
    block = MixMoEBlock(MixMoEConfig(**mixmoe_config(model.hf_config, model.options, model.sizes)))
    block.load_state_dict(state)
    return block


def start_table(rows: Sequence[StartRow]) -> str:
    """Return the starts as a table in Markdown."""
    texts = list(rows[0].perplexity)
    lines = [
        f"| start | MoE layers | {' | '.join(f'perplexity of {text}' for text in texts)} | times dense |",
        f"|---|---|{'---:|' * (len(texts) + 1)}",
    ]
    for row in rows:
        cells = [f"{row.perplexity[text]:.1f}" for text in texts]
        layers = ", ".join(map(str, row.layers))
        lines.append(f"| {row.start} | {layers} | {' | '.join(cells)} | {row.factor:.2f} |")
    return "\n".join(lines)
