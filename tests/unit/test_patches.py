"""What is changed in Megatron is changed once, however often it is asked for."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.training import checkpointing, training
from torch.optim import optimizer as torch_optimizer

from mixmoe_megatron.megatron_patches.install import install, prepare_megatron
from mixmoe_megatron.megatron_patches.wrapping import wrap
from tests.helpers.training import ROOT

PLACES = (
    training, checkpointing, filesystem_async, distrib_optimizer.DistributedOptimizer, optimizer.MegatronOptimizer,
    optimizer, clip_grads, distrib_optimizer,
)  # fmt: skip


def test_a_function_is_wrapped_once_and_the_last_wrapper_counts() -> None:
    class Owner:
        @staticmethod
        def add(a: int, b: int) -> int:
            """Add."""
            return a + b

    original = Owner.add
    for factor in (2, 3):
        wrap(Owner, "add", lambda add, a, b, factor=factor: factor * add(a, b))
        assert Owner.add.replaces is original and Owner.add.__doc__ == "Add."
        assert Owner.add(1, 2) == Owner().add(1, 2) == 3 * factor


def snapshot() -> list[dict[str, Any]]:
    """What lies in the places, a replaced function told by what it replaces and by who wrote it."""
    return [
        {name: getattr(getattr(place, name), "replaces", getattr(place, name)) for name in vars(place)
         if name != "num_floating_point_operations"}
        for place in PLACES
    ]  # fmt: skip


def test_installing_twice_changes_nothing() -> None:
    args = SimpleNamespace(
        phase="dense", mixmoe_stage=0, new_layers=(), lora_rank=0, world_size=1, dataloader_type=None
    )
    vars(args).update(bf16=False, fp16=False, padded_vocab_size=64)
    vars(args).update(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2)
    vars(args).update(kv_channels=4, vocab_size=64, untie_embeddings_and_output_weights=False, add_qkv_bias=False)
    prepare_megatron()
    install(args)
    before, hooks = snapshot(), len(torch_optimizer._global_optimizer_post_hooks)
    replaced = training.save_checkpoint.replaces
    prepare_megatron()
    install(args)
    assert snapshot() == before and len(torch_optimizer._global_optimizer_post_hooks) == hooks
    assert training.save_checkpoint.replaces is replaced and not hasattr(replaced, "replaces")


@pytest.mark.parametrize("module", ["training.pretrain", "planning.step_benchmark"])
def test_what_prepares_megatron_does_not_import_it_before(module: str) -> None:
    """Megatron compiles and looks for Transformer Engine when it is imported."""
    program = f"import mixmoe_megatron.{module}, sys; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
