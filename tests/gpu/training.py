"""Checks 2, 4 and 5: the training command on real text, in bfloat16, as a cluster runs it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.harness import DEVICE, ROOT, Check, NotRun, Rows

STEPS = 20
#: What examples/cluster.sh gives every run, at the quickstart's size.
CLUSTER = (
    "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --optimizer adam "
    "--weight-decay 0.0 --clip-grad 1.0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --moe-aux-loss-coeff 0.01 "
    "--eval-iters 0 --log-interval 1 --seed 1234 --num-workers 0 --micro-batch-size 4 --global-batch-size 8"
)
REFERENCE = Path(__file__).with_name("reference_losses.json")
LOSS_TOLERANCE = 0.05  # nats; bfloat16 rounds otherwise on every kind of processor, and 20 steps carry it on
NEXT_LOSS_TOLERANCE = 1e-2
RECOMPUTE = {
    "recompute full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute moe": "--recompute-granularity selective --recompute-modules moe",
    "recompute moe_act": "--recompute-granularity selective --recompute-modules moe_act",
}


@dataclass
class World:
    """A folder with the quickstart's base upcycled, its German text and its German-English pairs tokenised.

    Attributes:
        directory: the folder.
    """

    directory: Path

    def prepare(self) -> None:
        """Convert and tokenise."""
        out = self.directory
        base, upcycled = ROOT / "examples/quickstart/base", out / "upcycled"
        self._run(
            "checkpoints_conversion/hf_to_mixmoe.py", "--hf-dir", base, "--output-dir", upcycled, "--dtype", "bf16"
        )
        common = ["--tokenizer", upcycled / "tokenizer", "--output-prefix"]
        text, pairs = (ROOT / "examples/data" / name for name in ("mono.de.train.txt.gz", "de-en.train.tsv.gz"))
        self._run("tools/preprocess_data.py", "mono", "--input", text, *common, out / "mono")
        self._run(
            "tools/preprocess_data.py", "parallel", "--input", pairs, *common, out / "pairs", "--both-directions",
            "--source-language", "de", "--target-language", "en", "--source-column", "xx", "--target-column", "en",
            "--max-tokens", "129",
        )  # fmt: skip

    def _run(self, *words: Any) -> None:
        from tests.helpers.forked import run_job

        run_job([str(word) for word in words], 1, self.logs())

    def logs(self) -> Path:
        """A fresh folder for a job's output."""
        return self.directory / "logs" / str(time.monotonic_ns())

    def words(self, stage: int, save: str, parent: str, flags: str, steps: int = STEPS) -> list[str]:
        """The command line of a training run in this folder."""
        out = self.directory
        words = ["tools/pretrain_mixmoe.py", "--mixmoe-stage", str(stage), "--init-from", str(out / parent)]
        words += ["--data-path", str(out / ("mono" if stage == 1 else "pairs")), "--train-iters", str(steps)]
        words += ["--save", str(out / save), "--load", str(out / save), "--save-interval", "10", *CLUSTER.split()]
        words += ["--seq-length", "128", "--split", "100,0,0", "--lr", "1e-3" if stage == 1 else "2e-3"]
        return [*words, "--data-cache-path", str(out / "cache"), *flags.split()]

    def train(
        self, stage: int, save: str, parent: str, flags: str = "", steps: int = STEPS, on: str = ""
    ) -> list[float]:
        """Train and return the losses (nats a token) of the steps; `on`: "cpu" hides the GPU from this run."""
        from tests.helpers.forked import run_job
        from tests.helpers.training import logged

        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {}
        job = run_job(self.words(stage, save, parent, flags, steps), 1, self.logs(), hidden)
        return logged(job.stdout(0))[0]

    def weights(self, name: str) -> dict[str, Any]:
        """The tensors of a checkpoint of this folder."""
        from tests.helpers.training import checkpoint_tensors

        return checkpoint_tensors(self.directory / name)


def compare(losses: list[float], name: str, rows: Rows, facts: dict[str, Any]) -> None:
    """Hold losses to the committed ones, or take them as the reference."""
    if rows.write_reference:
        known = json.loads(REFERENCE.read_text("utf-8")) if REFERENCE.exists() else {}
        REFERENCE.write_text(json.dumps(known | {name: losses}, indent=1) + "\n", "utf-8")
    reference = json.loads(REFERENCE.read_text("utf-8"))[name]
    assert len(losses) == len(reference), f"{len(losses)} steps, the reference has {len(reference)}"
    worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    facts |= {"first_loss": losses[0], "last_loss": losses[-1], "largest_difference": worst}
    assert worst < LOSS_TOLERANCE, f"{worst:.3f} nats from the committed CPU losses"


def check_frozen(before: dict[str, Any], after: dict[str, Any], stage: int) -> dict[str, int]:
    """Hold every frozen tensor to its bits and every trained one to having moved."""
    import torch

    from mixmoe_megatron.methods.registry import phase_of_stage

    counts = {"frozen": 0, "trained": 0}
    for name, tensor in after.items():
        trained = phase_of_stage(stage).is_trained("module." + name)
        counts["trained" if trained else "frozen"] += 1
        if name in before:
            assert torch.equal(before[name], tensor) != trained, f"{name} {'did not move' if trained else 'moved'}"
    assert all(counts.values()), counts
    return counts


def run_training(rows: Rows) -> None:
    """Check 4: both stages, --pack, a kill in between; losses as on a CPU, frozen tensors bit-identical."""
    world = World(rows.scratch)
    with rows.row("upcycle and tokenise"):
        world.prepare()
    for stage, parent in ((1, "upcycled"), (2, "stage1")):
        with rows.row(f"stage {stage}: bf16, distributed optimizer, both overlaps") as facts:
            compare(world.train(stage, f"stage{stage}", parent), f"stage{stage}", rows, facts)
            facts |= check_frozen(world.weights(parent), world.weights(f"stage{stage}"), stage)
    with rows.row("stage 2, --pack") as facts:
        flags = "--pack --micro-batch-size 1 --global-batch-size 2 --seq-length 512"
        compare(world.train(2, "packed", "stage1", flags), "stage2 packed", rows, facts)
    with rows.row("stage 1 killed after its first save goes on to the same end") as facts:
        killed_at = kill_after_save(world, world.words(1, "killed", "upcycled", ""))
        losses = world.train(1, "killed", "upcycled")
        facts |= {"killed_at": killed_at, "steps_after": len(losses)}
        assert len(losses) == STEPS - 10, f"{len(losses)} steps after the restart"
        # Megatron's second log line after a start is the mean of two steps.
        reference = json.loads(REFERENCE.read_text("utf-8"))["stage1"][-len(losses) :]
        facts["largest_difference"] = max(abs(losses[n] - reference[n]) for n in range(len(losses)) if n != 1)
        assert facts["largest_difference"] < LOSS_TOLERANCE


def kill_after_save(world: World, words: list[str]) -> int:
    """Start a run, kill it two steps after its first save and return the step it was in."""
    import re

    from tests.helpers.forked import Job

    job = Job(words, 1, world.logs())
    end = time.monotonic() + 240
    while time.monotonic() < end:
        steps = [int(step) for step in re.findall(r"iteration +(\d+)/", job.stdout(0))]
        if steps and steps[-1] >= 12:
            job.kill()
            return steps[-1]
        if not any(process.is_alive() for process in job.processes):
            raise AssertionError(f"the run ended before it could be killed:\n{job.output()[-3000:]}")
        time.sleep(0.05)
    job.kill()
    raise AssertionError(f"no twelfth step in four minutes:\n{job.output()[-3000:]}")


def run_flags(rows: Rows) -> None:
    """Check 2: what may not change the losses does not, or is refused in one sentence."""
    import importlib.util

    world = World(rows.scratch)
    world.prepare()
    steps = 4
    usual = {stage: world.train(stage, f"usual{stage}", parent, steps=steps) for stage, parent in PARENTS.items()}
    for name, flags in RECOMPUTE.items():
        for stage, parent in PARENTS.items():
            with rows.row(f"{name}, stage {stage}") as facts:
                hold_equal(
                    world.train(stage, f"{name} {stage}".replace(" ", "_"), parent, flags, steps), usual[stage], facts
                )
    for name, flags, package in FUSED:
        with rows.row(name) as facts:
            if importlib.util.find_spec(package) is None:
                raise NotRun(f"{package} is not installed")
            run = name.replace(" ", "_")
            hold_equal(world.train(1, run, "upcycled", flags, steps), usual[1], facts)
            check_frozen(world.weights("upcycled"), world.weights(run), 1)  # every trained tensor moves


PARENTS = {1: "upcycled", 2: "usual1"}
FUSED = (
    ("permute fusion", "--moe-permute-fusion", "transformer_engine"),
    ("fused RoPE", "--apply-rope-fusion", "transformer_engine"),
    ("delayed weight gradients", "--overlap-dispatch-backward-with-experts-wgrad", "transformer_engine"),
    ("DeepEP", "--moe-token-dispatcher-type flex --moe-enable-deepep", "deep_ep"),
)


def hold_equal(losses: list[float], usual: list[float], facts: dict[str, Any]) -> None:
    """Hold a run's losses to those of the run without its flags."""
    facts["largest_difference"] = max(abs(a - b) for a, b in zip(losses, usual, strict=True))
    assert facts["largest_difference"] < NEXT_LOSS_TOLERANCE


def run_exchange(rows: Rows) -> None:
    """Check 5: a CPU's checkpoint goes on this device and back: bit-equal weights, the same next loss."""
    import torch

    world = World(rows.scratch)
    world.prepare()
    world.train(1, "cpu", "upcycled", steps=10, on="cpu")
    resume = "--override-opt-param-scheduler --lr 0 --min-lr 0"
    with rows.row(f"CPU -> {DEVICE}: loaded and saved without a change") as facts:
        copy_run(world, "cpu", "here")
        there = world.train(1, "here", "upcycled", resume, steps=11)
        before, after = world.weights("cpu"), world.weights("here")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        facts["tensors"] = len(before)
    with rows.row(f"CPU -> {DEVICE} -> CPU: weights bit-equal, the next loss equal") as facts:
        copy_run(world, "cpu", "stays")
        stays = world.train(1, "stays", "upcycled", resume, steps=11, on="cpu")
        facts["next_loss_difference"] = abs(there[-1] - stays[-1])
        assert facts["next_loss_difference"] < NEXT_LOSS_TOLERANCE
        back = world.train(1, "here", "upcycled", resume, steps=12, on="cpu")
        goes_on = world.train(1, "stays", "upcycled", resume, steps=12, on="cpu")
        facts["loss_after_return"] = abs(back[-1] - goes_on[-1])
        assert facts["loss_after_return"] == 0.0, "equal weights on one machine must give equal losses"


def copy_run(world: World, source: str, target: str) -> None:
    """Copy a run's folder."""
    import shutil

    shutil.copytree(world.directory / source, world.directory / target)


CHECKS = [
    Check(
        "train",
        "both stages, --pack, kill and resume: losses as on a CPU, frozen tensors bit-identical",
        run_training,
        True,
    ),
    Check("flags", "recomputation and fused kernels change nothing, or are refused", run_flags, limit=480),
    Check("exchange", "checkpoints go between a CPU and this device", run_exchange, True),
]
