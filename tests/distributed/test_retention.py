"""--eval-mono: the same value under every layout, the exported model's, and training goes on as if nothing had been."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.evaluation.models import load_model
from mixmoe_megatron.evaluation.perplexity import measure_perplexity
from mixmoe_megatron.evaluation.segments import read_monolingual
from mixmoe_megatron.study.training_log import Curves, read_training_log
from mixmoe_megatron.training.retention import HELD_OUT_BYTES
from tests.distributed.test_n_equals_one import CP, DISTRIBUTED_OPTIMIZER, EP, ETP, OVERLAP, PP, TP, VPP
from tests.helpers.forked import run_job
from tests.helpers.tiny_hf import SENTENCES
from tests.helpers.training import checkpoint_tensors, make_tiny_world, train, train_words

STEPS = 3
LONG = "--seq-length 160 "  # as long as the longest text
PACK = "--pack --seq-length 256 "
NAMES = ("bits_per_byte_de", "bits_per_byte_more_en")
KINDS = ("0", "1", "2", "packed")
PARENTS = (("base", "mono"), ("upcycled", "mono"), ("stage1", "pairs"))  # of each stage: the start and the data
#: layout -> (stage, processes, flags)
QUICK = {
    "stage 1, TP2 SP": (1, 2, TP),
    "stage 1, PP2": (1, 2, PP),
    "stage 1, EP2": (1, 2, EP),
    "stage 1, DP2, overlap": (1, 2, OVERLAP),
    "stage 2, PP2": (2, 2, PP),
    "stage 2, packed, EP2": (2, 2, EP + PACK),
}
SLOW = {
    "stage 1, CP2": (1, 2, CP),
    "stage 1, VPP2 PP2": (1, 2, VPP),
    "stage 1, TP2 PP2": (1, 4, TP + PP + DISTRIBUTED_OPTIMIZER),
    "stage 1, TP2 ETP2": (1, 2, TP + ETP),
    "stage 2, TP2 EP2": (2, 2, TP + EP),
    "stage 2, packed, PP2": (2, 2, PP + PACK),
    "stage 2, packed, TP2 SP": (2, 2, TP + PACK),
    "stage 0, TP2": (0, 2, TP),
    "stage 0, DP2, overlap": (0, 2, OVERLAP),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in all stages, data, and two files of held-out text."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory)
    (directory / "de.txt").write_text("\n".join(SENTENCES) + "\n\n", "utf-8")
    (directory / "more.en.txt").write_text("One more sentence, held out.\n" * 7, "utf-8")
    train(1, directory / "upcycled", directory / "mono", directory / "stage1", 2)
    return directory


def watch(world: Path, stage: int, run: Path, processes: int = 1, flags: str = "") -> Curves:
    """Train with --eval-mono; return what TensorBoard got, which the log of rank 0 confirms."""
    parent, data = PARENTS[stage]
    extra = f"{LONG} {flags} --eval-mono {world / 'de.txt'} {world / 'more.en.txt'} --eval-mono-interval 2 "
    extra += f"--tensorboard-dir {run}/tensorboard --data-cache-path {run}/cache --hf-save {run}/hf"
    words = train_words(stage, world / parent, world / data, run / "save", STEPS, extra)
    job = run_job(words, processes, run / "logs")
    curves = read_training_log(run / "tensorboard")
    (run / "log").write_text(job.stdout(processes - 1) + job.output(), "utf-8")
    log = read_training_log(run / "log")
    for name in NAMES:
        assert [step for step, _ in curves[name]] == [0, 2, 3]
        assert log[name] == [(step, pytest.approx(value, rel=1e-5)) for step, value in curves[name]]
    return curves


@cache
def one_process(world: Path, kind: str) -> Curves:
    """Train in one process, once for all tests; the run is one_KIND of the world."""
    return watch(world, stage_of(kind), world / f"one_{kind}", flags=PACK if kind == "packed" else "")


def stage_of(kind: str) -> int:
    return 2 if kind == "packed" else int(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_the_exported_models(world: Path, kind: str) -> None:
    curves = one_process(world, kind)
    model = load_model("exported", world / f"one_{kind}" / "hf" / f"iter_{STEPS:07d}")
    for name, file in zip(NAMES, ("de.txt", "more.en.txt"), strict=True):
        texts = read_monolingual(world / file, max_bytes=HELD_OUT_BYTES)
        assert curves[name][-1][1] == pytest.approx(measure_perplexity(model, texts).bits_per_byte, rel=1e-5)


def test_the_start_of_dense_training_is_the_base(world: Path) -> None:
    base = load_model("base", world / "base")
    expected = measure_perplexity(base, read_monolingual(world / "de.txt")).bits_per_byte
    assert one_process(world, "0")[NAMES[0]][0][1] == pytest.approx(expected, rel=1e-5)


def test_tokens_seen_are_told_of_monolingual_text(world: Path) -> None:
    assert one_process(world, "1")["tokens_seen"] == [(step, step * 8 * 160) for step in (0, 2, 3)]
    assert "tokens_seen" not in one_process(world, "2")


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit(world: Path, kind: str, tmp_path: Path) -> None:
    curves = one_process(world, kind)
    parent, data = PARENTS[stage_of(kind)]
    extra = f"{LONG} {PACK if kind == 'packed' else ''} --tensorboard-dir {tmp_path}/tensorboard "
    train(stage_of(kind), world / parent, world / data, tmp_path / "save", STEPS,
          f"{extra} --data-cache-path {tmp_path}/cache")  # fmt: skip
    without = read_training_log(tmp_path / "tensorboard")
    for name in ("lm_loss", "grad_norm"):
        assert curves[name] == without[name]
    expected = checkpoint_tensors(tmp_path / "save")
    for name, tensor in checkpoint_tensors(world / f"one_{kind}" / "save").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_layout_tells_the_same(world: Path, layout: str, tmp_path: Path) -> None:
    stage, processes, flags = (QUICK | SLOW)[layout]
    expected = one_process(world, "packed" if "--pack" in flags else str(stage))
    curves = watch(world, stage, tmp_path, processes, flags)
    for name in NAMES:
        assert curves[name] == [(step, pytest.approx(value, rel=2e-5)) for step, value in expected[name]]
    assert curves["lm_loss"] == [(step, pytest.approx(value, abs=1e-5)) for step, value in expected["lm_loss"]]
