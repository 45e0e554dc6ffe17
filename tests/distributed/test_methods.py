"""Every method keeps the same promises: N equal one, frozen bits stay, killed runs go on, exports come back.

Mix-MoE itself has a longer list of layouts in test_n_equals_one.py and test_resharding.py, of kills in test_kills.py.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion import hf_to_mixmoe, mixmoe_to_hf
from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.parity import check_parity
from mixmoe_megatron.methods.registry import METHODS, PHASES
from tests.distributed.conftest import Log
from tests.distributed.test_n_equals_one import (
    CP,
    EP,
    FULL,
    OVERLAP,
    PP,
    TP,
    assert_optimizer_state_of_trained_tensors_only,
)
from tests.helpers.crashes import die_at_size
from tests.helpers.forked import Job
from tests.helpers.norms_method import forget_norms, register_norms
from tests.helpers.tiny_hf import SENTENCES
from tests.helpers.training import checkpoint_tensors, make_monolingual, train, train_words

STEPS = 10
#: method -> words of its conversion, and the phases that are trained, each from the start
CASES: dict[str, tuple[list[str], list[str]]] = {
    "full": ([], ["dense"]),
    "llama_pro": (["--new-blocks", "2"], ["llama_pro"]),
    "norms": ([], ["norms"]),
    "lora": (["--lora-rank", "4"], ["lora"]),
    "moe": (["--moe-every", "2", "--num-experts-per-group", "4"], ["moe", "moe_all"]),
    "moe_lpr": (["--moe-every", "2"], ["lpr_experts", "lpr_router"]),
    "llama_moe_v2": (["--moe-every", "2", "--num-experts-per-group", "4"], ["llama_moe_v2"]),
    "llama_moe_v2_residual": (
        ["--num-experts-per-group", "4", "--shared-experts", "4"],
        ["llama_moe_v2_residual"],
    ),
}
LAYOUTS = {
    "TP2 SP": (2, TP),
    "DP2, distributed optimizer, overlap": (2, OVERLAP),
    "PP2": (2, PP),
    "CP2": (2, CP),
    "PP2, recompute full": (2, PP + FULL),
}
WITH_EXPERTS = {
    "EP2": (2, EP),
    "EP4, distributed optimizer": (4, "--expert-model-parallel-size 4 " + OVERLAP),
    "TP2 EP2, distributed optimizer": (2, TP + EP + OVERLAP),
}
QUICK = {
    ("llama_pro", "PP2, recompute full"), ("lora", "DP2, distributed optimizer, overlap"), ("lora", "CP2"),
    ("moe", "EP2"), ("lpr_experts", "EP2"), ("lpr_router", "EP2"), ("llama_moe_v2", "PP2"),
    ("llama_moe_v2_residual", "EP2"),
}  # fmt: skip
QUICK_KILLS = ("llama_pro", "lpr_router")
TRAININGS = [(method, phase) for method, (_, phases) in CASES.items() for phase in phases]
COMMON = "--micro-batch-size 2 "


class Runs:
    """Starts and one-process runs of the methods, each made once."""

    def __init__(self, world: Path, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.start, self.alone = cache(self._start), cache(self._alone)

    def _start(self, method: str) -> Path:
        output = self.directory / method / "start"
        words = ["--hf-dir", self.world / "base", "--output-dir", output, "--method", method, *CASES[method][0]]
        assert hf_to_mixmoe.main(list(map(str, words))) == 0
        return output

    def run(self, method: str, phase: str, save: Path, flags: str = "", processes: int = 1) -> Log:
        """Train to step 10, or as `flags` say; returns losses and gradient norms."""
        flags = self.flags(method, phase, flags)
        return train(
            phase, self.start(method), self.world / "pairs", save, STEPS, flags, processes, prelude=register_norms
        )

    def flags(self, method: str, phase: str, flags: str) -> str:
        """Return the flags of a run, `flags` among them."""
        flags = f"{COMMON}{flags} --seq-length 160 --data-cache-path {self.directory}/cache"
        if "lpr_coeff" in PHASES[phase].defaults:  # some tokens are of an original language, and some are not
            old = self.directory / "old"
            if not old.with_suffix(".json").exists():
                make_monolingual(old, SENTENCES[::2], self.start(method) / "tokenizer")
            flags += f" --data-path {self.world}/mono {old} --lpr-original-data-path {old}"
        return flags

    def _alone(self, method: str, phase: str) -> tuple[Path, Log]:
        save = self.directory / method / phase
        return save, self.run(method, phase, save)


@pytest.fixture(scope="module")
def runs(world: Path) -> Iterator[Runs]:
    register_norms()
    with tempfile.TemporaryDirectory() as directory:
        yield Runs(world, Path(directory))
    forget_norms()


def assert_close(found: Path, expected: Path) -> None:
    """Check that two checkpoints hold the same model but for rounding.

    LoRA's B begins at zero, and Adam's first steps are as large for gradients that are next to nothing as for others.
    """
    tensors = checkpoint_tensors(expected)
    assert checkpoint_tensors(found).keys() == tensors.keys()
    for name, tensor in checkpoint_tensors(found).items():
        difference = (tensor - tensors[name]).abs().max() / tensors[name].abs().max().clamp_min(1e-3)
        allowed = 2e-3 if ".lora." in name else 1e-4
        assert difference < allowed, f"{name} differs by {difference:.1e} of its largest value"


def combinations() -> Iterator[Any]:
    """Every phase under every layout that makes sense for it; the quick ones are TP2 for all, and one of each other."""
    for method, phase in TRAININGS:
        for layout in [*LAYOUTS, *(WITH_EXPERTS if PHASES[phase].groups else {})] if phase != "norms" else ["TP2 SP"]:
            is_quick = layout == "TP2 SP" or (phase, layout) in QUICK
            yield pytest.param(method, phase, layout, marks=[] if is_quick else [pytest.mark.slow])


@pytest.mark.parametrize(("method", "phase", "layout"), combinations())
def test_n_processes_equal_one(runs: Runs, method: str, phase: str, layout: str, tmp_path: Path) -> None:
    processes, flags = (LAYOUTS | WITH_EXPERTS)[layout]
    expected, (losses, norms) = runs.alone(method, phase)
    found_losses, found_norms = runs.run(method, phase, tmp_path / "run", flags, processes)
    assert found_losses == pytest.approx(losses, abs=1e-5, rel=0)
    assert found_norms == pytest.approx(norms, rel=2e-3)
    assert_close(tmp_path / "run", expected)
    found, one = checkpoint_tensors(tmp_path / "run"), checkpoint_tensors(expected)
    new_layers = read_metadata(expected).new_layers
    frozen = {name for name in one if not PHASES[phase].is_trained(name, new_layers)}
    assert all(torch.equal(found[name], one[name]) for name in frozen)


@pytest.mark.parametrize(("method", "phase"), TRAININGS)
def test_what_is_frozen_keeps_its_bits(runs: Runs, method: str, phase: str) -> None:
    start, (save, _) = runs.start(method), runs.alone(method, phase)
    new_layers = read_metadata(save).new_layers
    before, after = checkpoint_tensors(start), checkpoint_tensors(save)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        is_trained = PHASES[phase].is_trained(name, new_layers)
        assert torch.equal(tensor, before[name]) != is_trained, name
    if new_layers:
        assert_optimizer_state_of_trained_tensors_only(save, lambda name: PHASES[phase].is_trained(name, new_layers))


@pytest.mark.parametrize(("method", "phase"), TRAININGS)
def test_a_run_goes_on_under_another_layout(runs: Runs, method: str, phase: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    runs.run(method, phase, save, "--exit-interval 5")
    runs.run(method, phase, save, TP, 2)
    assert_close(save, runs.alone(method, phase)[0])
    assert read_metadata(save).phase is PHASES[phase] and read_metadata(save).parent is not None


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        pytest.param(method, phase, marks=[] if phase in QUICK_KILLS else [pytest.mark.slow])
        for method, phase in TRAININGS
        if phase != "norms"
    ],
)
def test_a_killed_run_ends_as_the_undisturbed_one(runs: Runs, method: str, phase: str, tmp_path: Path) -> None:
    """It dies in the middle of its second save, and goes on from the first."""
    save, flags = tmp_path / "run", runs.flags(method, phase, "--save-interval 4")
    words = train_words(phase, runs.start(method), runs.world / "pairs", save, STEPS, flags)
    job = Job(words, 1, tmp_path / "killed", prelude=die_at_size(save, 0, "iter_0000008/__0_0.distcp", 1000))
    assert job.wait() == [-signal.SIGXFSZ], job.output()[-8000:]
    losses, _ = runs.run(method, phase, save)
    assert len(losses) == STEPS - 4
    expected, found = checkpoint_tensors(runs.alone(method, phase)[0]), checkpoint_tensors(save)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("method", "phase"), TRAININGS)
def test_an_export_is_the_model_and_comes_back(runs: Runs, method: str, phase: str, tmp_path: Path) -> None:
    save, back = runs.alone(method, phase)[0], tmp_path / "back"
    assert mixmoe_to_hf.main(["--checkpoint-dir", str(save), "--output-dir", str(tmp_path / "hf")]) == 0
    assert check_parity(str(tmp_path / "hf"), str(save), None, 1e-4, "fp32", None)[1] is None
    words = ["--hf-dir", str(tmp_path / "hf"), "--method", method]
    if PHASES[phase].groups:
        words = words[:2]
    elif PHASES[phase].has_adapters:
        adapter = str(tmp_path / "adapter")
        assert mixmoe_to_hf.main(["--checkpoint-dir", str(save), "--output-dir", adapter, "--format", "adapter"]) == 0
        words = ["--hf-dir", str(runs.world / "base"), "--method", method, "--adapter", adapter]
    assert hf_to_mixmoe.main([*words, "--output-dir", str(back)]) == 0
    before, after = checkpoint_tensors(save), checkpoint_tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_metadata(back).new_layers == read_metadata(save).new_layers


@pytest.mark.usefixtures("runs")
def test_all_methods_are_tried() -> None:
    assert set(CASES) == set(METHODS) - {"mixmoe"}
