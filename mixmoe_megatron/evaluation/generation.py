"""Batched translation with transformers' generate: sorted by length, left-padded, first line only, resumable.

Greedy decoding goes in rounds: a round ends when a quarter of its rows has ended, and the rest goes on as a smaller
batch with its part of the key-value cache, so that a few long rows do not hold all others.

Shape legend: B segments in a batch, R rows that generate works on (B, or B times the beams it keeps), P padded prompt
length and N new tokens, both in tokens, V rows of the output layer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from mixmoe_megatron.data.prompts import encode_prompts
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.batches import pad
from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.evaluation.progress import Progress

logger = logging.getLogger(__name__)

RATIO_MARGIN = 16  # tokens granted on top of max_length_ratio times the source
ROUND_SHARE = 0.75  # a round of greedy decoding ends when at most this part of its rows goes on
_LINE_BREAKS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")  # those of str.splitlines


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode; the defaults are the paper's (beam 5, at most 256 new tokens).

    Attributes:
        decoding: ``beam`` or ``greedy``.
        num_beams: Beams of beam search; greedy ignores it.
        max_new_tokens: Most new tokens of one segment.
        max_length_ratio: Also stop a segment at this many times its source's tokens plus 16; None sets no such bound.
        batch_size: Segments decoded together; results depend on it by floating-point rounding only.

    Raises:
        MixMoEError: An unknown decoding or a number out of range.
    """

    decoding: str = "beam"
    num_beams: int = 5
    max_new_tokens: int = 256
    max_length_ratio: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.decoding not in ("greedy", "beam"):
            raise MixMoEError(f"The decoding must be greedy or beam, not {self.decoding!r}.")
        if self.decoding == "beam" and self.num_beams < 2:
            raise MixMoEError(
                f"Beam search needs at least 2 beams, not {self.num_beams}; choose greedy decoding for 1."
            )
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise MixMoEError("The batch size and the number of new tokens must be at least 1.")
        if self.max_length_ratio is not None and self.max_length_ratio <= 0:
            raise MixMoEError(f"The length ratio must be above 0, not {self.max_length_ratio}.")

    def budget(self, source_tokens: int) -> int:
        """Return the most new tokens for a source of `source_tokens` tokens."""
        if self.max_length_ratio is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, int(self.max_length_ratio * source_tokens) + RATIO_MARGIN)


def first_line(text: str) -> str:
    """Return the first line with content, stripped: the translation proper.

    Whatever str.splitlines breaks at ends the line, so a hypothesis always fits one line of a file.
    """
    return (text.strip().splitlines() or [""])[0].strip()


class LineTable:
    """What each vocabulary entry does to the first line, as bool tensors of shape [V].

    Attributes:
        has_content: The token's text holds something besides whitespace.
        has_break: It holds a line break.
        ends_line: It holds content and then a line break, so that it completes a line by itself.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, device: torch.device) -> None:
        """Decode every vocabulary entry once.

        Args:
            tokenizer: Decodes single tokens; embedding rows beyond its ids count as empty.
            vocab_size: V.
            device: Where the tables are kept.
        """
        known = min(vocab_size, tokenizer.vocab_size)
        texts = tokenizer.hf.batch_decode([[index] for index in range(known)], skip_special_tokens=True)
        texts += [""] * (vocab_size - known)
        self.has_content = torch.tensor([bool(text.strip()) for text in texts], device=device)
        self.has_break = torch.tensor([not _LINE_BREAKS.isdisjoint(text) for text in texts], device=device)
        ends_line = [not _LINE_BREAKS.isdisjoint(text.lstrip()) for text in texts]
        self.ends_line = torch.tensor(ends_line, device=device)

    def is_complete(self, new_tokens: torch.Tensor) -> torch.Tensor:
        """Tell which rows hold a complete first line.

        Args:
            new_tokens: [R, N] int64, the generated tokens.

        Returns:
            [R] bool.
        """
        content = self.has_content[new_tokens].cumsum(dim=1) > 0
        content_before = torch.nn.functional.pad(content[:, :-1], (1, 0), value=False)
        return (self.ends_line[new_tokens] | (self.has_break[new_tokens] & content_before)).any(dim=1)


@dataclass(eq=False)
class FirstLineOrBudget(StoppingCriteria):
    """End a row when its first line is complete, its own budget of new tokens is spent, or the round is over.

    Attributes:
        table: Of the model's vocabulary.
        prompt_length: P.
        budgets: [B] int64, most new tokens of each segment.
        eos_ids: [E] int64, tokens that end a row.
        go_on_above: All rows end when at most this many go on; 0: each row ends by itself.
        on_step: Called with N at each check, which comes once a token.
    """

    table: LineTable
    prompt_length: int
    budgets: torch.Tensor
    eos_ids: torch.Tensor
    go_on_above: int = 0
    on_step: Callable[[int], None] = lambda new_tokens: None

    def has_ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tell which rows have ended by themselves.

        Args:
            input_ids: [R, P + N] int64; the rows of one segment are adjacent.

        Returns:
            [R] bool.
        """
        new_tokens = input_ids[:, self.prompt_length :]
        budgets = self.budgets.repeat_interleave(input_ids.shape[0] // self.budgets.shape[0])
        ended = torch.isin(new_tokens, self.eos_ids).any(dim=1)
        return ended | self.table.is_complete(new_tokens) | (new_tokens.shape[1] >= budgets)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Check every row.

        Args:
            input_ids: [R, P + N] int64; the rows of one segment are adjacent.
            scores: Unused.
            kwargs: Unused.

        Returns:
            [R] bool, True where the row is finished.
        """
        self.on_step(input_ids.shape[1] - self.prompt_length)
        ended = self.has_ended(input_ids)
        return ended | ((~ended).sum() <= self.go_on_above)


def _read_partial(path: Path, count: int) -> dict[int, str]:
    """Return the hypotheses an interrupted run left; a torn last line is dropped from the file as well."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    try:
        records = [json.loads(line) for line in data[:whole].splitlines()]
        done = {record["index"]: record["hypothesis"] for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise MixMoEError(f"{path} is damaged: delete it to start this system anew.") from error
    if whole < len(data):
        os.truncate(path, whole)
    if any(index >= count for index in done):
        raise MixMoEError(f"{path} holds more segments than the test set: delete it to start this system anew.")
    return done


def _check_lengths(loaded: LoadedModel, prompts: Sequence[list[int]], budgets: Sequence[int]) -> None:
    """Warn of, or for absolute positions refuse, sequences beyond the positions the model was made for."""
    limit = loaded.max_positions
    if limit is None:
        return
    longest, budget = max(zip(map(len, prompts), budgets, strict=True), key=sum)
    if longest + budget <= limit:
        return
    message = (
        f"System {loaded.name!r}: the longest prompt ({longest} tokens) and its {budget} new tokens exceed the model's "
        f"{limit} positions"
    )
    if not loaded.has_rotary_positions:
        raise MixMoEError(f"{message}; lower the number of new tokens or drop long segments.")
    logger.warning("%s; the model extrapolates there.", message)


@torch.inference_mode()
def _generate_batch(
    loaded: LoadedModel,
    table: LineTable,
    prompts: list[list[int]],
    budgets: list[int],
    options: GenerationOptions,
    progress: Progress,
) -> list[str]:
    """Decode one batch, greedily in rounds of fewer and fewer rows, and return the first line of each hypothesis."""
    pad_id, is_greedy = loaded.tokenizer.pad_id, options.decoding == "greedy"
    input_ids, attention_mask = pad(prompts, "left", pad_id, loaded.device)
    width, most = input_ids.shape[1], torch.tensor(budgets, device=loaded.device)
    eos_ids = torch.tensor(loaded.eos_ids, device=loaded.device)
    segments = torch.arange(len(prompts), device=loaded.device)  # of the rows that go on
    hypotheses: dict[int, list[int]] = {}
    cache = None

    def show(new_tokens: int) -> None:
        progress.show(new_tokens * len(prompts), f"token {new_tokens} of at most {max(budgets)} of a batch")

    while len(hypotheses) < len(prompts):
        limit = int(ROUND_SHARE * len(segments)) if is_greedy else 0
        criterion = FirstLineOrBudget(table, width, most[segments], eos_ids, limit, show)
        output = loaded.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=width + max(budgets) - input_ids.shape[1],
            num_beams=1 if is_greedy else options.num_beams,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([criterion]),
            return_dict_in_generate=True,
        )
        ended = criterion.has_ended(output.sequences) if is_greedy else torch.ones_like(segments, dtype=torch.bool)
        rows = output.sequences[ended, width:].tolist()
        hypotheses.update(zip(segments[ended].tolist(), rows, strict=True))
        going_on = (~ended).nonzero().flatten()
        segments, input_ids = segments[going_on], output.sequences[going_on]
        seen = attention_mask[going_on]
        attention_mask = torch.nn.functional.pad(seen, (0, input_ids.shape[1] - seen.shape[1]), value=1)
        cache = output.past_key_values
        if isinstance(cache, DynamicCache):
            cache.batch_select_indices(going_on)
        else:  # another kind can't give up rows: the next round reads what it has once more
            cache = None
    lengths = [len(row) - row.count(pad_id) for row in hypotheses.values()]
    progress.advance(len(prompts), sum(map(len, prompts)), sum(lengths))
    return [first_line(loaded.tokenizer.decode(hypotheses[index])) for index in range(len(prompts))]


def translate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sources: Sequence[str],
    options: GenerationOptions,
    partial_path: Path,
    label: str = "",
) -> list[str]:
    """Translate all segments, longest first; finished batches are kept on disk and not decoded again.

    A batch of which only a part is on disk is decoded again as a whole: rounding depends on how segments are batched.

    Args:
        loaded: The model.
        prompts: Rendered prompts, one a segment.
        sources: The text inside each prompt; its tokens set the budget (see `GenerationOptions`).
        options: How to decode.
        partial_path: JSONL file of finished hypotheses ({"index", "hypothesis"}); its directory must exist. The caller
            must not reuse it with other segments or options.
        label: Begins the progress line.

    Returns:
        One single-line hypothesis a segment, in the order given.

    Raises:
        MixMoEError: `partial_path` is of another test set, or a prompt is too long for a model with absolute positions.
    """
    done = _read_partial(partial_path, len(prompts))
    prompt_ids = encode_prompts(loaded.tokenizer, prompts)
    source_ids = loaded.tokenizer.encode(list(sources), add_special_tokens=False)
    budgets = [options.budget(len(ids)) for ids in source_ids]
    _check_lengths(loaded, prompt_ids, budgets)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompt_ids[index]), index))
    batches = [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]
    remaining = [batch for batch in batches if not done.keys() >= set(batch)]
    finished = len(prompts) - sum(map(len, remaining))
    work = sum(len(prompt_ids[index]) for batch in remaining for index in batch)
    table = LineTable(loaded.tokenizer, loaded.vocab_size, loaded.device)
    with (
        partial_path.open("a", encoding="utf-8") as stream,
        Progress(label, len(prompts), done=finished, work=work) as progress,
    ):
        for batch in remaining:
            ids, most = [prompt_ids[index] for index in batch], [budgets[index] for index in batch]
            lines = _generate_batch(loaded, table, ids, most, options, progress)
            for index, line in zip(batch, lines, strict=True):
                done[index] = line
                stream.write(json.dumps({"index": index, "hypothesis": line}, ensure_ascii=False) + "\n")
            stream.flush()
    return [done[index] for index in range(len(prompts))]
