"""The mapping tables: every row crosses and comes back, and every key of the source is accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixmoe_megatron.checkpoint.bits import Bits
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.plan import Target, describe_tensors, expand, plan_tensors
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.extra_state import extra_state_keys
from mixmoe_megatron.model.mapping import TABLES, Side, Sizes
from tests.helpers.mappings import DENSE, MOE, OPTIONS, Memory, random_hf, values


def carry(source: Memory, sizes: Sizes, to: Side, table: str = "same", dtype: str = "keep") -> Memory:
    options = OPTIONS if sizes.spectral else replace(OPTIONS, spectral_transform="none")
    plan = plan_tensors(expand(TABLES[table], sizes), source, sizes, Target(to, dtype, options))
    return Memory({tensor.name: values(tensor) for tensor in plan})


@pytest.mark.parametrize(
    "sizes",
    [DENSE, replace(DENSE, tied=True, qkv_bias=False), MOE, replace(MOE, num_groups=1), replace(MOE, spectral=False),
     replace(MOE, router_bias=False, num_groups=1), replace(MOE, moe_layers=(0, 1, 2))],
    ids=["dense", "tied", "stage2", "stage1", "no_spectral", "no_bias", "all_moe"],
)  # fmt: skip
def test_there_and_back_is_bit_equal(sizes: Sizes) -> None:
    start = random_hf(sizes)
    megatron = carry(start, sizes, "megatron")
    assert not set(megatron.tensors) & set(start.tensors)
    back = carry(megatron, sizes, "hf")
    assert list(back.tensors) == list(start.tensors)
    assert all(torch.equal(back.tensors[name], value) for name, value in start.tensors.items())


def test_qkv_is_interleaved_by_query_group() -> None:
    source = random_hf(DENSE)
    merged = carry(source, DENSE, "megatron").tensors["decoder.layers.2.self_attention.linear_qkv.weight"]
    q, k, v = (source.tensors[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = torch.cat([q[:6], k[:3], v[:3], q[6:], k[3:], v[3:]])
    assert torch.equal(merged, expected)


def test_vocabulary_padding_is_zero() -> None:
    source = random_hf(DENSE)
    for name, origin in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        padded = carry(source, DENSE, "megatron").tensors[name]
        assert torch.equal(padded[:10], source.tensors[origin]) and not padded[10:].any() and len(padded) == 16


def test_groups_keep_their_experts() -> None:
    source = random_hf(MOE)
    megatron = carry(source, MOE, "megatron").tensors
    packed = source.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(megatron["decoder.layers.1.mlp.experts.lm_experts.experts.linear_fc1.weight"], packed[:2])
    assert torch.equal(megatron["decoder.layers.1.mlp.experts.mt_experts.experts.linear_fc1.weight"], packed[2:])
    assert not megatron["decoder.layers.1.mlp.router.lm.spectral_weight"].any()


def test_upcycling_a_dense_model() -> None:
    sizes = replace(MOE, num_groups=1)
    source = random_hf(DENSE)
    result = carry(source, sizes, "megatron", "upcycle").tensors
    expected = {name for unit in expand(TABLES["same"], sizes) for name, _ in unit.megatron}
    assert set(result) == expected
    gate, up = (source.tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    fc1 = result["decoder.layers.1.mlp.experts.lm_experts.experts.linear_fc1.weight"]
    assert torch.equal(fc1[1], torch.cat((gate[6:], up[6:])))
    assert (
        result["decoder.layers.1.mlp.router.lm.weight"].std() > 0
        and not result["decoder.layers.1.mlp.router.lm.bias"].any()
    )


def test_a_shared_expert_and_the_others_hold_each_neuron_once() -> None:
    sizes = replace(MOE, num_groups=1, shared_experts=2, moe_ffn_hidden_size=3)
    source = random_hf(DENSE)
    result = carry(source, sizes, "megatron", "upcycle").tensors
    names = [f"decoder.layers.1.mlp.{part}.linear_fc" for part in ("shared_experts", "experts.lm_experts.experts")]
    (fc1, experts1), (fc2, experts2) = ([result[f"{name}{i}.weight"] for name in names] for i in (1, 2))
    for half, name in enumerate(("gate", "up")):
        parts = [fc1.chunk(2)[half], *(expert.chunk(2)[half] for expert in experts1)]
        assert torch.equal(torch.cat(parts), source.tensors[f"model.layers.1.mlp.{name}_proj.weight"])
    assert torch.equal(torch.cat([fc2, *experts2], 1), source.tensors["model.layers.1.mlp.down_proj.weight"])


def test_routers_are_never_cast() -> None:
    megatron = carry(random_hf(MOE), MOE, "megatron", dtype="bf16").tensors
    halves = {name for name, value in megatron.items() if value.dtype is torch.bfloat16}
    assert {name for name in megatron if "router" not in name} == halves
    folded = carry(Memory({n: t.bfloat16() for n, t in megatron.items()}), MOE, "hf").tensors
    assert folded["model.layers.1.mlp.router.weight"].dtype is torch.float32


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_every_key_is_accounted_for(to: Side) -> None:
    hf = random_hf(MOE)
    source = hf if to == "megatron" else carry(hf, MOE, "megatron")
    name = sorted(n for n in source.tensors if "layers.1" in n and "mlp" in n and "experts" in n)[0]
    whole = dict(source.tensors)

    def refusal(tensors: dict[str, Tensor]) -> str:
        with pytest.raises(MixMoEError) as error:
            carry(Memory(tensors), MOE, to)
        return str(error.value)

    assert f"lack {name}" in refusal({k: v for k, v in whole.items() if k != name})
    assert "no mapping uses: extra.weight" in refusal({**whole, "extra.weight": torch.zeros(1)})
    assert f"{name} has shape" in refusal({**whole, name: whole[name][1:]})
    assert f"{name} has dtype int8" in refusal({**whole, name: whole[name].to(torch.int8)})


def test_parts_of_one_tensor_must_agree_in_dtype() -> None:
    source = random_hf(DENSE)
    source.tensors["model.layers.0.self_attn.k_proj.weight"] = source.tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].half()
    with pytest.raises(MixMoEError, match=r"k_proj.*differ in dtype"):
        carry(source, DENSE, "megatron")


def test_many_missing_keys_make_one_short_sentence() -> None:
    with pytest.raises(MixMoEError, match=r"and \d+ more\.$"):
        carry(Memory({}), DENSE, "megatron")


def test_nothing_is_read_before_it_is_written() -> None:
    class NotReadable(Memory):
        def read_region(self, name: str, region: Region) -> Bits:
            raise AssertionError(name)

    source = NotReadable(random_hf(DENSE).tensors)
    plan = plan_tensors(expand(TABLES["same"], DENSE), source, DENSE, Target("megatron"))
    text = describe_tensors(plan, "somewhere")
    assert text.endswith(f"{len(plan)} tensors, {sum(t.num_bytes for t in plan)} bytes -> somewhere")
    assert isinstance(plan[0], LazyTensor) and plan[0].num_bytes == 16 * 8 * 4


def test_extra_state_keys() -> None:
    dense, moe = extra_state_keys(DENSE), extra_state_keys(MOE)
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_2_3" in dense
    assert "decoder.layers.2.mlp.linear_fc1._extra_state/shard_0_1" in moe
    assert "decoder.layers.1.mlp.experts.mt_experts.experts.linear_fc2._extra_state/shard_1_2" in moe
    assert not any("layers.1.mlp.linear" in key for key in moe)
    assert len(set(moe)) == len(moe) and len(set(dense)) == len(dense)
