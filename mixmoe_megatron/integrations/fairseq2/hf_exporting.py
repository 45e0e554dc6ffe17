"""fairseq2 -> Hugging Face: what fairseq2's own exporter calls for this family; code and tokenizer go along.

That exporter is a process of its own which knows the configuration and float32 weights, and looks the configuration's
class up in the module `transformers`. Hence `ExportedMixMoEConfig`, which `extension.py` makes known there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fairseq2.models.hg import HuggingFaceConfig, HuggingFaceConverter
from fairseq2.utils.config import cast_config_type
from transformers import PretrainedConfig

from mixmoe_megatron.checkpoint.hf_files import copy_side_files
from mixmoe_megatron.conversion.exported import copy_code
from mixmoe_megatron.hf import MixMoEConfig
from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig
from mixmoe_megatron.integrations.fairseq2.state_dicts import to_hf_state_dict


class ExportedMixMoEConfig(PretrainedConfig):
    """What fairseq2 makes, fills and saves as a configuration: it writes that of the model, and what lies beside it.

    Attributes:
        exported: of the model.
        side_files: see `MixMoEModelConfig`.
    """

    exported: MixMoEConfig | None = None
    side_files: str | None = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json, the model's code, and the side files of the model that this one came from.

        Args:
            save_directory: made if missing.
            kwargs: as transformers takes them.

        Raises:
            MixMoEError: a side file is a link to nowhere.
        """
        assert self.exported is not None, "fairseq2 fills it in"
        self.exported.architectures = self.architectures
        self.exported.save_pretrained(save_directory, **kwargs)
        copy_code(save_directory)
        if self.side_files is not None:
            copy_side_files(self.side_files, Path(save_directory))


class MixMoEHuggingFaceConverter(HuggingFaceConverter):
    """Configuration and tensors of a model of this family as Hugging Face has them."""

    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        """Return what `ExportedMixMoEConfig` writes.

        Raises:
            MixMoEError: see `MixMoEModelConfig.from_hf`.
        """
        ours = cast_config_type(config, MixMoEModelConfig)
        values = {"exported": ours.to_hf(), "side_files": ours.side_files}
        return HuggingFaceConfig(values, kls_name=ExportedMixMoEConfig.__name__, arch="MixMoEForCausalLM")

    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        """Return the tensors of the Hugging Face model, see `to_hf_state_dict`."""
        return to_hf_state_dict(state_dict, cast_config_type(config, MixMoEModelConfig))
