"""The retention curve: bits a byte of held-out monolingual text while a model trains (--eval-mono).

Upcycling takes something of what the base knew, and stage 1 pays it back; stage 2 may take of it again. Texts and
windows are those of `evaluation.perplexity`, and so are the values, of the model that would be exported at that step.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import get_tensorboard_writer, get_wandb_writer

from mixmoe_megatron.data.parallel import collate, padded_width
from mixmoe_megatron.data.tokenizers import open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.batches import MAX_WINDOW, batches_by_length, split_windows
from mixmoe_megatron.evaluation.segments import read_monolingual
from mixmoe_megatron.training.datasets import pad_multiple
from mixmoe_megatron.training.megatron_args import MegatronArgs
from mixmoe_megatron.training.step import forward_step

logger = logging.getLogger(__name__)

HELD_OUT_BYTES = 64 * 1024  # of each file: some 15,000 tokens


@dataclass(frozen=True)
class HeldOutText:
    """A file of texts.

    Attributes:
        name: of its curve, letters, digits and underscores.
        sequences: the texts' token ids, cut into windows; the first id of each is context only.
        num_bytes: UTF-8 bytes of the texts.
    """

    name: str
    sequences: list[list[int]]
    num_bytes: int


class RetentionCurve:
    """Measures and logs what a model knows of the files of --eval-mono.

    Args:
        args: Megatron's namespace with Mix-MoE's arguments, the sizes known.

    Raises:
        MixMoEError: the interval is none, or no step is to be trained; a file is missing, holds no text, is not UTF-8,
            or has another one's name.
    """

    def __init__(self, args: MegatronArgs):
        self.interval = args.eval_interval if args.eval_mono_interval is None else args.eval_mono_interval
        if not self.interval or self.interval < 1:
            raise MixMoEError("--eval-mono-interval (default: --eval-interval) must be 1 or more.")
        if args.skip_train:
            raise MixMoEError("--eval-mono measures before, between and after training steps: leave --skip-train out.")
        self.args = args
        self.tokenizer = open_tokenizer(args.tokenizer_model, args.vocab_size)
        self.files: dict[str, HeldOutText] = {}
        for path in map(Path, args.eval_mono or ()):
            file = self._read(path)
            if file.name in self.files:
                raise MixMoEError(f"--eval-mono: two files are called {file.name}: give them different names.")
            self.files[file.name] = file

    def _read(self, path: Path) -> HeldOutText:
        texts = read_monolingual(path, max_bytes=HELD_OUT_BYTES)
        start = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        window = min(MAX_WINDOW, self.args.seq_length + 1)
        encoded = self.tokenizer.encode(texts, add_special_tokens=False)
        sequences = [piece for ids in encoded for piece in split_windows(ids, start, window)]
        name = re.sub(r"[^A-Za-z0-9]+", "_", path.name.split(".txt")[0]).strip("_") or "text"
        return HeldOutText(name, sequences, sum(len(text.encode("utf-8")) for text in texts))

    def measure(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Measure the model and write the values to the log (rank 0), TensorBoard and W&B (the last rank).

        Args:
            model: this rank's chunks, in evaluation mode, without gradients.
            iteration: steps done.
        """
        values = {f"bits per byte {name}": value for name, value in self.bits_per_byte(model).items()}
        seen = {}
        if self.args.dataloader_type == "single":  # of parallel text the lengths differ, and only the steps are known
            seen = {"tokens seen": float(self.args.consumed_train_samples * self.args.seq_length)}
        for name, value in values.items() if self.args.rank == 0 else ():
            line = "".join(f" {what}: {number:.6E} |" for what, number in {name: value, **seen}.items())
            logger.info(f"held-out text at iteration {iteration:8d}/{self.args.train_iters:8d} |{line}")
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in {**values, **seen}.items():
                writer.add_scalar(name, value, iteration)
        if (wandb := get_wandb_writer()) is not None:
            wandb.log({**values, **seen}, iteration)

    def bits_per_byte(self, model: list[torch.nn.Module]) -> dict[str, float]:
        """Return bits a byte by file, the same on all ranks, which share the work under whatever layout.

        Args:
            model: as `measure`.
        """
        run = get_forward_backward_func()
        losses = torch.zeros(len(self.files), dtype=torch.float64, device=torch.cuda.current_device())
        parts = get_model_config(model[0]).microbatch_group_size_per_vp_stage  # as many as pipeline stages, or more
        for index, file in enumerate(self.files.values()):
            for batches in self._micro_batches(file.sequences, parts):
                rows, width = batches[0]["tokens"].shape
                iterators = [iter(batches) for _ in model]  # each virtual stage reads all
                reports = run(
                    forward_step_func=forward_step,
                    data_iterator=iterators if len(model) > 1 else iterators[0],
                    model=model,
                    num_microbatches=parts,
                    seq_length=width,
                    micro_batch_size=rows,
                    forward_only=True,
                )
                losses[index] += sum(report["lm loss"][0] for report in reports)  # none but on the last pipeline stage
        if mpu.get_tensor_model_parallel_rank() > 0:
            losses.zero_()  # of a tensor-parallel group all ranks have the same
        torch.distributed.all_reduce(losses)
        bits = (losses / math.log(2)).tolist()
        return {file.name: value / file.num_bytes for file, value in zip(self.files.values(), bits, strict=True)}

    def _micro_batches(self, sequences: list[list[int]], parts: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Yield this rank's `parts` micro-batches of one pass, of one shape on all ranks, as `forward_step` takes them.

        Sequences of similar length are together; a pass has about as many tokens as the same micro-batches in training.
        """
        args = self.args
        replicas, replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        places = replicas * parts
        for numbers in batches_by_length(sequences, places * args.micro_batch_size * args.seq_length):
            rows = math.ceil(len(numbers) / places)
            samples = [_sample(sequences[number]) for number in numbers]
            nothing = {**samples[-1], "loss_mask": np.zeros_like(samples[-1]["loss_mask"])}
            samples += [nothing] * (rows * places - len(samples))
            width = padded_width(len(samples[0]["tokens"]), pad_multiple(args), args.seq_length, False)
            first = replica * parts * rows
            batches = [
                collate(samples[begin : begin + rows], pad_id=self.tokenizer.eos_id, max_length=width, pad_to_max=True)
                for begin in range(first, first + parts * rows, rows)
            ]
            if args.pack:  # each row is a document of one long row: its positions begin at 0
                batches = [{key: value.view(1, -1) for key, value in batch.items()} for batch in batches]
            yield batches


def _sample(ids: list[int]) -> dict[str, np.ndarray]:
    """What `collate` takes: each id but the first is predicted from those before it."""
    return {
        "tokens": np.array(ids[:-1]),
        "labels": np.array(ids[1:]),
        "loss_mask": np.ones(len(ids) - 1, dtype=np.float32),
    }
