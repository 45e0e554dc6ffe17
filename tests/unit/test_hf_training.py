"""Training the Hugging Face Mix-MoE model further: aux loss, checkpointing, Trainer, LoRA, a larger vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mixmoe_megatron.hf import MixMoEForCausalLM, router_aux_loss
from tests.helpers.tiny_hf import tiny_mixmoe

FAMILIES = ("llama", "qwen2")


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_aux_loss_is_1_when_balanced_and_n_at_collapse(top_k: int) -> None:
    """Group 0 balanced: each expert is chosen equally often. Group 1: all tokens choose the same top_k experts."""
    balanced = torch.stack([torch.eye(4).roll(shift, dims=0) for shift in range(top_k)]).sum(dim=0) * 50
    collapsed = torch.zeros(4, 4)
    collapsed[:, :top_k] = 50
    layer = torch.cat([balanced, collapsed], dim=1)
    expected = torch.tensor([1.0, 4.0 / top_k])
    torch.testing.assert_close(router_aux_loss((layer, layer), num_groups=2, top_k=top_k), expected)


def test_aux_loss_leaves_padding_out() -> None:
    logits = (torch.randn(6, 8), torch.randn(6, 8))
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    kept = mask.flatten().bool()
    expected = router_aux_loss(tuple(layer[kept] for layer in logits), 2, 1)
    torch.testing.assert_close(router_aux_loss(logits, 2, 1, mask), expected)


def test_aux_loss_joins_the_training_loss_only() -> None:
    model = tiny_mixmoe(mixmoe_aux_loss_coef=0.5)
    ids, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    plain = model(ids, attention_mask=mask, labels=ids)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    reported = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert torch.equal(reported.loss, plain.loss)
    assert torch.equal(reported.aux_loss, router_aux_loss(reported.router_logits, 2, 1, mask).sum())
    trained = model.train()(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * reported.aux_loss)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids, attention_mask=torch.zeros(2, 1, 8, 8), labels=ids)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, tied: bool) -> None:
    model = tiny_mixmoe(family, mixmoe_aux_loss_coef=0.1, tie_word_embeddings=tied).train()
    ids = token_ids(2, 8)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_reentrant_checkpointing_with_aux_loss_is_refused() -> None:
    model, ids = tiny_mixmoe(mixmoe_aux_loss_coef=0.1).train(), token_ids(2, 8)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids, labels=ids)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied: bool) -> None:
    model, ids = tiny_mixmoe(tie_word_embeddings=tied), token_ids(2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(520, mean_resizing=False)
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == model.config.vocab_size == 520
    torch.testing.assert_close(after.logits[..., :512], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_accumulated_micro_batches_give_the_loss_of_one_batch() -> None:
    """With the target count of the whole batch, as Trainer passes it, parts add up, the aux loss included."""
    model, ids = tiny_mixmoe(mixmoe_aux_loss_coef=0.5).train(), token_ids(1, 9).expand(4, 9)
    whole = model(ids, labels=ids).loss
    parts = [model(part, labels=part, num_items_in_batch=4 * 8).loss for part in ids.split(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_trainer_trains_with_checkpointing_and_accumulation(tmp_path: Path) -> None:
    model = tiny_mixmoe(mixmoe_aux_loss_coef=0.01)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(1, 9).expand(16, 9)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        gradient_checkpointing=True, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    ids = token_ids(2, 7)
    loaded = MixMoEForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_lora_on_attention_and_packed_experts(tmp_path: Path) -> None:
    """Only the adapters train; saved, loaded and merged they give the same model."""
    peft = pytest.importorskip("peft")
    ids = token_ids(2, 8)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    base = tiny_mixmoe()
    before = base(ids).logits
    model = peft.get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].split("layers.")[1] for name in trained} >= {
        "0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.experts", "3.mlp.experts.base_layer",
    }  # fmt: skip
    model.train()(input_ids=ids, labels=ids).loss.backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert norms.keys() == trained and all(norm > 0 for norm in norms.values())
    adapted = model.eval()(input_ids=ids).logits
    assert (adapted - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_mixmoe(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, adapted, rtol=1e-3, atol=1e-3)
