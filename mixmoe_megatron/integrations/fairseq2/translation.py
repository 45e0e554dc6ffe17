"""Translation with fairseq2's generators, which hold two traps.

They forbid EOS until the longest prompt of a batch is passed: here a batch is of prompts of one length. And they put
EOS in the place of the last token: here they are given one token more, so that it is lost to nobody.

Shape legend: B prompts of a batch, P tokens of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq2 import init_fairseq2
from fairseq2.assets import AssetCardError
from fairseq2.composition import register_checkpoint_models, register_file_assets
from fairseq2.data.tokenizers import TokenizerNotKnownError
from fairseq2.generation import SequenceGenerator
from fairseq2.generation.beam_search import BeamSearchSequenceGenerator
from fairseq2.generation.sampling import SamplingSequenceGenerator, TopKSampler
from fairseq2.models import ModelNotKnownError
from fairseq2.models.transformer_lm import TransformerLM
from fairseq2.nn import BatchLayout
from fairseq2.runtime.dependency import DependencyContainer

from mixmoe_megatron.data.prompts import PromptTemplate, encode_prompts
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.generation import first_line
from mixmoe_megatron.integrations.fairseq2.native_tokenizer import MixMoETokenizer


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Attributes:
        beams: 1: greedy; more: fairseq2's beam search.
        max_new_tokens: most tokens of a translation, EOS not counted.
        batch_size: most prompts of a batch; they are of equal length.

    Raises:
        MixMoEError: a number is below 1.
    """

    beams: int = 1
    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise MixMoEError(f"--{name.replace('_', '-')} must be 1 or more, not {value}.")


def load_by_name(
    model: str, tokenizer: str, cards: Sequence[Path], checkpoint_dir: Path | None
) -> tuple[TransformerLM, MixMoETokenizer]:
    """Set fairseq2 up, once in a process, and load a model of the family with its tokenizer.

    Args:
        model: name of its card.
        tokenizer: name of its card.
        cards: files or directories of cards, beside those that fairseq2 finds by itself.
        checkpoint_dir: of a recipe's run, whose models are then known as checkpoint_step_N; None: no such models.

    Raises:
        MixMoEError: there is no such card, or it is of another family.
    """
    for path in [*cards, *([checkpoint_dir] if checkpoint_dir else [])]:
        if not path.exists():
            raise MixMoEError(f"{path} does not exist.")

    def extras(container: DependencyContainer) -> None:
        for path in cards:
            register_file_assets(container, path.resolve())
        if checkpoint_dir is not None:
            register_checkpoint_models(container, checkpoint_dir.resolve())

    init_fairseq2(extras=extras, no_progress=True)
    from mixmoe_megatron.integrations.fairseq2.extension import get_mixmoe_model_hub, get_mixmoe_tokenizer_hub

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = get_mixmoe_model_hub().load_model(model, device=device, dtype=torch.float32)
        return loaded, get_mixmoe_tokenizer_hub().load_tokenizer(tokenizer)
    except (ModelNotKnownError, TokenizerNotKnownError) as error:
        raise MixMoEError(f"{error} Name one by --model and --tokenizer, and where its card is by --cards.") from None
    except AssetCardError as error:
        raise MixMoEError(str(error)) from error


def translate_sources(
    model: TransformerLM,
    tokenizer: MixMoETokenizer,
    sources: Sequence[str],
    languages: tuple[str, str],
    options: DecodingOptions,
    template: PromptTemplate,
) -> list[str]:
    """Translate texts.

    Args:
        model: of this family.
        tokenizer: of the model.
        sources: the texts.
        languages: codes of source and target.
        options: how to decode.
        template: the prompt that the model was trained with.

    Returns:
        The first line of each hypothesis.

    Raises:
        MixMoEError: a language is unknown, or a prompt leaves no room for a translation.
    """
    text_tokenizer = tokenizer.text_tokenizer
    prompts = encode_prompts(text_tokenizer, [template.render(source, *languages) for source in sources])
    longest = max(map(len, prompts), default=0)
    if longest + options.max_new_tokens + 1 > model.max_seq_len:
        raise MixMoEError(
            f"The longest prompt has {longest} tokens, which with --max-new-tokens {options.max_new_tokens} are more "
            f"than the model's {model.max_seq_len} positions."
        )
    generator = _generator(model, tokenizer, options)
    translations = [""] * len(sources)
    device = next(model.parameters()).device
    for places in batches_of_equal_length(prompts, options.batch_size):
        batch = torch.tensor([prompts[place] for place in places], device=device)  # [B, P]
        output = generator(batch, BatchLayout.of(batch))
        for place, hypotheses in zip(places, output.hypotheses, strict=True):
            translations[place] = first_line(text_tokenizer.decode(hypotheses[0].seq.tolist()))
    return translations


def batches_of_equal_length(prompts: Sequence[Sequence[Any]], batch_size: int) -> list[list[int]]:
    """Return the places of prompts in batches of at most `batch_size`, those of a batch of one length."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        by_length[len(prompt)].append(place)
    return [
        places[start : start + batch_size]
        for _, places in sorted(by_length.items())
        for start in range(0, len(places), batch_size)
    ]


def _generator(model: TransformerLM, tokenizer: MixMoETokenizer, options: DecodingOptions) -> SequenceGenerator:
    """Return fairseq2's generator, with room for the EOS that it puts last."""
    room = {"max_gen_len": options.max_new_tokens + 1}
    if options.beams > 1:
        return BeamSearchSequenceGenerator(model, tokenizer.vocab_info, beam_size=options.beams, **room)
    return SamplingSequenceGenerator(model, tokenizer.vocab_info, TopKSampler(k=1), temperature=1.0, **room)
