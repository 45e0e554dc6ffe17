"""The Hugging Face Mix-MoE model: plain PyTorch and transformers, the reference of the parity tests.

The two files `configuration_mixmoe.py` and `modeling_mixmoe.py` are also the code inside an exported checkpoint, which
loads with `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` where this package is absent.
Where it is imported, the Auto classes know Mix-MoE and need no trust.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mixmoe import AUTO_MAP, MixMoEConfig
from .modeling_mixmoe import MixMoEForCausalLM, MixMoEModel, MixMoEPreTrainedModel, router_aux_loss


def register_auto_classes() -> None:
    """Make the Auto classes know Mix-MoE, so that exports load without trust_remote_code. Harmless when repeated."""
    AutoConfig.register(MixMoEConfig.model_type, MixMoEConfig, exist_ok=True)
    AutoModel.register(MixMoEConfig, MixMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(MixMoEConfig, MixMoEForCausalLM, exist_ok=True)


register_auto_classes()

__all__ = [
    "AUTO_MAP",
    "MixMoEConfig",
    "MixMoEForCausalLM",
    "MixMoEModel",
    "MixMoEPreTrainedModel",
    "register_auto_classes",
    "router_aux_loss",
]
