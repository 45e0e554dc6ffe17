"""An estimate of the activations that a rank keeps for the backward pass.

Counted is what the modules of a layer save, with flash attention and a SwiGLU that saves its input, and tokens spread
evenly over the experts. A frozen linear layer keeps no input. Layers below the first trained one keep nothing (they
build no graph, see `frozen_prefix.py`), nor does the frozen attention of a first MoE layer. Logits are counted for all
tokens, which is the worst case: of pairs whose targets alone carry loss they take about half (`loss_rows.py`). Not
counted: what a kernel needs for a moment, fragmentation.

Shape legend: t tokens of a micro-batch on a context-parallel rank, s = t / TP (sequence parallel), r = rows of all
groups that this rank's experts get. H hidden_size, F ffn_hidden_size, f moe_ffn_hidden_size, Q attention heads x head
size, K query groups x head size, P padded vocabulary. Per element B bytes (2 in bfloat16).

| part | elements |
|---|---|
| attention | s H + 3 t (Q + K) / TP (one tensor of Q + 2 K, rotated Q + K, output Q); trained: + s H |
| dense FFN | s H + 2 t F / TP; trained: + s H + t F / TP |
| LoRA | what trained linear layers keep, and rank r times: 5 t + 2 s (q, k, v, gate, up of all tokens; o, down) |
| MoE FFN | 2 s H (first MoE layer: s H) + r (H + 2 f / ETP); trained group: + its rows x f / ETP |
| shared expert of width w | 2 t w / TP; trained: + t w / TP |
| output | s H; trained: + s H; logits t P / TP, and 4 bytes for each of them (float32 softmax) |
"""

from __future__ import annotations

from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout, lowest_layer

_LOGIT_COPIES_BYTES = 4  # the float32 softmax, whose place its gradient takes (bfloat16's then takes the logits')


def activation_bytes(model: ModelDescription, layout: ParallelLayout, batch: Batch, pp_rank: int) -> int:
    """Estimate the peak of the activations on the ranks of a pipeline stage.

    A stage keeps the activations of as many micro-batches as it has started and not finished (1F1B schedule), but
    only one set of logits. With full recomputation it keeps the inputs of the layers, and one layer's activations.

    Args:
        model: the model.
        layout: the parallel sizes.
        batch: sizes, dtype and recomputation.
        pp_rank: the pipeline stage.
    """
    sizes, size = model.sizes_under(layout.tp), batch.bytes_per_element
    tokens = batch.micro_batch_size * batch.seq_length // layout.cp
    hidden = tokens // layout.tp * sizes.hidden_size * size
    lowest = lowest_layer(model)
    kept = [
        _layer_bytes(sizes, model, layout, layer, tokens, size)
        for layer in layout.layers(sizes.num_layers, pp_rank)
        if layer >= lowest
    ]
    in_flight = min(layout.micro_batches(batch), layout.pp - pp_rank)
    total = in_flight * sum(kept)
    if batch.recompute == "full":
        total = in_flight * len(kept) * hidden + max(kept, default=0)
    if pp_rank == layout.pp - 1:
        logits = tokens * sizes.padded_vocab_size // layout.tp
        total += hidden * (1 + model.is_trained("output_layer.weight")) + logits * (size + _LOGIT_COPIES_BYTES)
    return total


def _layer_bytes(
    sizes: Sizes, model: ModelDescription, layout: ParallelLayout, layer: int, tokens: int, size: int
) -> int:
    """Bytes of one layer above the frozen prefix for one micro-batch."""
    trained = model.is_trained(f"decoder.layers.{layer}.self_attention.linear_qkv.weight") or sizes.lora_rank > 0
    sequence = tokens // layout.tp * sizes.hidden_size
    query, key = sizes.num_attention_heads * sizes.kv_channels, sizes.num_query_groups * sizes.kv_channels
    attention = sequence * (1 + trained) + 3 * tokens * (query + key) // layout.tp
    if layer not in sizes.moe_layers:
        ffn = sequence * (1 + trained) + tokens * sizes.ffn_hidden_size * (2 + trained) // layout.tp
        low = sizes.lora_rank * (5 * tokens + 2 * tokens // layout.tp)
        return size * (attention + ffn + low)
    is_first = layer == lowest_layer(model)
    rows = tokens // layout.tp * model.topk_per_group * layout.etp  # of one group
    inner = sizes.moe_ffn_hidden_size // layout.etp
    learning = sum(
        count
        for block, count in sizes.blocks().items()
        if model.is_trained(f"decoder.layers.{layer}.mlp.experts.{block}.experts.linear_fc2.weight")
    )
    experts = rows * sizes.num_groups * (sizes.hidden_size + 2 * inner)
    experts += rows * learning * inner // sizes.num_experts_per_group
    shared_trains = model.is_trained(f"decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight")
    experts += tokens * sizes.shared_ffn_hidden_size * (2 + shared_trains) // layout.tp
    return size * (attention * (not is_first) + sequence * (2 - is_first) + experts)
