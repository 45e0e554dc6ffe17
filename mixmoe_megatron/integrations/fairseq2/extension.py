"""What fairseq2 calls when it starts (the entry point `fairseq2.extension` in pyproject.toml): registers all of this.

fairseq2 only warns of an extension that fails; FAIRSEQ2_EXTENSION_TRACE=1 makes it stop.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import metadata

import transformers
from fairseq2.composition import register_dataset_family, register_model_family, register_tokenizer_family
from fairseq2.data.tokenizers import TokenizerHubAccessor
from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConverter
from fairseq2.models.transformer_lm import (
    TransformerLM,
    apply_ac_to_transformer_lm,
    apply_fsdp_to_transformer_lm,
    compile_transformer_lm,
)
from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.integrations.fairseq2.architecture import FAMILY, MixMoEModelConfig, architectures
from mixmoe_megatron.integrations.fairseq2.corpora import (
    MONOLINGUAL_FAMILY,
    PARALLEL_FAMILY,
    MonolingualCorpus,
    MonolingualCorpusConfig,
    ParallelCorpus,
    ParallelCorpusConfig,
)
from mixmoe_megatron.integrations.fairseq2.hf_exporting import ExportedMixMoEConfig, MixMoEHuggingFaceConverter
from mixmoe_megatron.integrations.fairseq2.native_model import create_mixmoe_model
from mixmoe_megatron.integrations.fairseq2.native_tokenizer import (
    MixMoETokenizer,
    MixMoETokenizerConfig,
    load_mixmoe_tokenizer,
)
from mixmoe_megatron.integrations.fairseq2.state_dicts import from_any_state_dict

#: What this was written for and tested with.
RELEASE = "0.8."
#: Models and tokenizers of the family by name, as fairseq2's other families have it.
get_mixmoe_model_hub = ModelHubAccessor(FAMILY, kls=TransformerLM, config_kls=MixMoEModelConfig)
get_mixmoe_tokenizer_hub = TokenizerHubAccessor(FAMILY, kls=MixMoETokenizer, config_kls=MixMoETokenizerConfig)


def setup_fairseq2_extension(container: DependencyContainer) -> None:
    """Register the model family with its presets and its export to Hugging Face, the tokenizer family, datasets.

    Args:
        container: of fairseq2.

    Raises:
        MixMoEError: fairseq2 is of another release, whose interfaces are others.
    """
    version = metadata.version("fairseq2")
    if not version.startswith(RELEASE):
        raise MixMoEError(f"Mix-MoE goes with fairseq2 {RELEASE}x, not {version}: each release changes its interfaces.")
    # Where fairseq2's exporter looks classes up.
    transformers.ExportedMixMoEConfig = ExportedMixMoEConfig  # type: ignore[attr-defined]
    register_model_family(
        container,
        FAMILY,
        TransformerLM,
        MixMoEModelConfig,
        factory=create_mixmoe_model,
        state_dict_converter=from_any_state_dict,
        compiler=compile_transformer_lm,
        fsdp_applier=apply_fsdp_to_transformer_lm,
        layerwise_ac_applier=apply_ac_to_transformer_lm,
    )
    register_arch = ConfigRegistrar(container, MixMoEModelConfig)
    for name, config in architectures().items():
        register_arch(name)(partial(deepcopy, config))
    container.register_type(HuggingFaceConverter, MixMoEHuggingFaceConverter, key=FAMILY)
    register_dataset_family(
        container, MONOLINGUAL_FAMILY, MonolingualCorpus, MonolingualCorpusConfig, opener=MonolingualCorpus
    )
    register_dataset_family(container, PARALLEL_FAMILY, ParallelCorpus, ParallelCorpusConfig, opener=ParallelCorpus)
    register_tokenizer_family(container, FAMILY, MixMoETokenizer, MixMoETokenizerConfig, loader=load_mixmoe_tokenizer)
