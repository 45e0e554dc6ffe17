"""What a method of training is, in plain data: its phases, what each trains, and where each starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

#: The parts of a GPTModel, in order: the first pattern found in a parameter's name decides.
PARTS: dict[str, str] = {
    "adapters": r"\.lora\.",
    "base expert": r"\.mlp\.experts\.base_expert\.",
    "LM experts": r"\.mlp\.experts\.lm_experts\.",
    "MT experts": r"\.mlp\.experts\.mt_experts\.",
    "shared experts": r"\.mlp\.shared_experts\.",
    "LM routers": r"\.mlp\.router\.lm\.",
    "MT routers": r"\.mlp\.router\.mt\.",
    "embedding": r"(^|\.)embedding\.",
    "output layer": r"(^|\.)output_layer\.",
    "norms": r"norm",
    "attention": r"\.self_attention\.",
    "dense FFNs": r"\.mlp\.",
    "other": "",
}
#: The part that LoRA adds.
ADAPTERS = "adapters"
#: In the place of parts: the phase trains the whole model.
ALL_PARAMETERS = "all parameters"
#: In the place of parts: the phase trains whole layers that its start put between those of the base.
NEW_LAYERS = "new layers"
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """Return the part ("LM experts", "attention", ...) that a parameter belongs to, by its name in a GPTModel."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


@dataclass(frozen=True)
class Phase:
    """A method's step of training, or what a conversion makes for the next one. A checkpoint is of one phase.

    Attributes:
        name: what checkpoints record, and what the commands call it ("stage1"); no two phases of any method share one.
        groups: names of the expert groups that the model has, in their logical order; none in a dense model.
        trains: the parts of the model that training changes, names of `PARTS`, `NEW_LAYERS` or `ALL_PARAMETERS`; none
            in a phase that only a conversion makes.
        starts_from: names of the phases whose checkpoints it may start from.
        data: kinds of token files that it is meant for, "monolingual" and "parallel".
        made_by: what to run to get a checkpoint of it, the end of a sentence.
        defaults: values of training arguments that are its defaults, in place of those of all phases.
    """

    name: str
    groups: tuple[str, ...]
    trains: tuple[str, ...]
    starts_from: tuple[str, ...]
    data: tuple[str, ...]
    made_by: str
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def stage(self) -> int:
        """The stage's number as the model knows it (`mixmoe_stage`): how many expert groups there are."""
        return len(self.groups)

    @property
    def has_new_layers(self) -> bool:
        """Whether its models have layers that the base has not."""
        return NEW_LAYERS in self.trains

    @property
    def has_adapters(self) -> bool:
        """Whether its models have low-rank matrices beside the base's linear layers."""
        return ADAPTERS in self.trains

    def is_trained(self, parameter: str, new_layers: Collection[int] = ()) -> bool:
        """Whether a parameter trains.

        Args:
            parameter: its name in a GPTModel, layers numbered from 0 through the whole model.
            new_layers: numbers of the layers that the base has not.
        """
        if ALL_PARAMETERS in self.trains or part_of(parameter) in self.trains:
            return True
        layer = _LAYER.search(parameter)
        return self.has_new_layers and layer is not None and int(layer[1]) in new_layers


@dataclass(frozen=True)
class Method:
    """A way to teach a dense language model to translate.

    Attributes:
        name: what checkpoints record.
        meaning: one line for people.
        phases: in the order in which they follow each other. The first is what a conversion makes of a dense model.
        options: values of Mix-MoE options that are its defaults, in place of the preset's.
        exports_as: transformers' model_type of an export of its phases with experts.
    """

    name: str
    meaning: str
    phases: tuple[Phase, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    exports_as: str = "mixmoe"
