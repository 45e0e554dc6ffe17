"""What the server behind `tests.helpers.forked` imports once. Nothing here may start a thread or a process group."""

from __future__ import annotations

import importlib

from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode

enable_cpu_mode()
for name in (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.training.arguments",
    "megatron.core.dist_checkpointing.strategies.torch",
    "transformers.models.auto.tokenization_auto",
    "mixmoe_megatron.training.run",
    "mixmoe_megatron.study.runner",
    "mixmoe_megatron.study.tables",
    "nltk.translate.meteor_score",
    "transformers.models.qwen2.modeling_qwen2",
):
    importlib.import_module(name)
