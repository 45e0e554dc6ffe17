"""Generation with the Hugging Face Mix-MoE model: caches, padding, beams, sampling."""

from __future__ import annotations

import pytest
import torch

from mixmoe_megatron.hf import MixMoEForCausalLM
from tests.helpers.tiny_hf import tiny_mixmoe

CASES = [("llama", 1), ("llama", 2), ("qwen2", 2)]
PROMPTS = [[1, 17, 250, 33, 408, 96, 5, 77], [1, 300, 41, 9]]


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request: pytest.FixtureRequest) -> MixMoEForCausalLM:
    family, stage = request.param
    model = tiny_mixmoe(family, stage)
    model.generation_config.eos_token_id = None  # always generate the full length
    return model


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    ids = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_equals_uncached(model: MixMoEForCausalLM, num_beams: int) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "num_return_sequences": num_beams}
    cached = model.generate(**left_padded(PROMPTS), **options)
    assert cached.shape == (len(PROMPTS) * num_beams, 8 + 8)
    assert torch.equal(cached, model.generate(**left_padded(PROMPTS), **options, use_cache=False))


def test_decoding_step_by_step_gives_the_logits_of_one_pass(model: MixMoEForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    expected = model(ids).logits
    past_key_values, logits = None, []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=past_key_values, use_cache=True)
        past_key_values = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, expected[:, -2:])


def test_left_padding_changes_nothing(model: MixMoEForCausalLM) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    batch = model.generate(**left_padded(PROMPTS), **options)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        alone = model.generate(**left_padded([prompt]), **options)[0]
        assert row[-8:].tolist() == alone[-8:].tolist()


def test_static_cache_equals_dynamic(model: MixMoEForCausalLM) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**left_padded(PROMPTS), **options)
    assert torch.equal(model.generate(**left_padded(PROMPTS), **options, cache_implementation="static"), expected)


def test_sampling_follows_the_seed(model: MixMoEForCausalLM) -> None:
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(**left_padded(PROMPTS), max_new_tokens=8, do_sample=True, top_k=50))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_router_logits_are_recorded_while_generating(model: MixMoEForCausalLM) -> None:
    """A config that asks for router logits must not stop generation, with a static cache's 4D masks neither."""
    model.config.output_router_logits = True
    try:
        for cache in (None, "static"):
            model.generate(**left_padded(PROMPTS), max_new_tokens=3, do_sample=False, cache_implementation=cache)
    finally:
        model.config.output_router_logits = False
