"""What a method of training is, in plain data: its phases, what each trains, and where each starts."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: The parts of a GPTModel, in order: the first pattern found in a parameter's name decides.
PARTS: dict[str, str] = {
    "LM experts": r"\.mlp\.experts\.lm_experts\.",
    "MT experts": r"\.mlp\.experts\.mt_experts\.",
    "LM routers": r"\.mlp\.router\.lm\.",
    "MT routers": r"\.mlp\.router\.mt\.",
    "embedding": r"(^|\.)embedding\.",
    "output layer": r"(^|\.)output_layer\.",
    "norms": r"norm",
    "attention": r"\.self_attention\.",
    "dense FFNs": r"\.mlp\.",
    "other": "",
}
#: In the place of parts: the phase trains the whole model.
ALL_PARAMETERS = "all parameters"


def part_of(name: str) -> str:
    """Return the part ("LM experts", "attention", ...) that a parameter belongs to, by its name in a GPTModel."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


@dataclass(frozen=True)
class Phase:
    """A method's step of training, or what a conversion makes for the next one. A checkpoint is of one phase.

    Attributes:
        name: what checkpoints record, and what the commands call it ("stage1"); no two phases of any method share one.
        groups: names of the expert groups that the model has, in their logical order; none in a dense model.
        trains: the parts of the model that training changes, names of `PARTS`, or `ALL_PARAMETERS`; none in a phase
            that only a conversion makes.
        starts_from: names of the phases whose checkpoints it may start from.
        data: kinds of token files that it is meant for, "monolingual" and "parallel".
        made_by: what to run to get a checkpoint of it, the end of a sentence.
    """

    name: str
    groups: tuple[str, ...]
    trains: tuple[str, ...]
    starts_from: tuple[str, ...]
    data: tuple[str, ...]
    made_by: str

    @property
    def stage(self) -> int:
        """The stage's number as the model knows it (`mixmoe_stage`): how many expert groups there are."""
        return len(self.groups)

    def is_trained(self, parameter: str) -> bool:
        """Whether a parameter trains, by its name in a GPTModel."""
        return ALL_PARAMETERS in self.trains or part_of(parameter) in self.trains


@dataclass(frozen=True)
class Method:
    """A way to teach a dense language model to translate.

    Attributes:
        name: what checkpoints record.
        meaning: one line for people.
        phases: in the order in which they follow each other.
    """

    name: str
    meaning: str
    phases: tuple[Phase, ...]
