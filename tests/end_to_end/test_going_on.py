"""A run that goes on with other flags: it does, or one sentence names the flag; and first runs with next to nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE
from tests.end_to_end.conftest import Run
from tests.helpers.command_batch import assert_one_sentence, listing
from tests.helpers.forked import Job
from tests.helpers.training import train_words


def run(words: list[str], logs: Path, processes: int = 1) -> tuple[list[int], str, str]:
    """Run a job; return the exit codes, all that its ranks printed and the last rank's stderr."""
    job = Job(words, processes, logs)
    codes = job.wait()
    return codes, job.output(), (logs / f"{processes - 1}.err").read_text()


def steps_in(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"iteration +(\d+)/", output)]


@pytest.fixture
def begun(tiny_world: Path, stage1_run: Run, tmp_path: Path) -> Path:
    """A copy of the run of six steps, batch size 8."""
    return shutil.copytree(stage1_run.directory, tmp_path / "run")


def words_of(tiny_world: Path, save: Path, steps: int, extra: str = "") -> list[str]:
    return train_words(1, tiny_world / "upcycled", tiny_world / "mono", save, steps, extra)


@pytest.mark.parametrize(
    ("extra", "steps", "processes", "message"),
    [
        ("", 8, 1, "48 lr_decay_steps there, 64 here (--train-iters, --train-samples, --lr-decay-iters)"),
        ("--lr 5e-4", 8, 1, "0.001 max_lr there, 0.0005 here (--lr)"),
        ("--global-batch-size 16", 8, 1, "It ran with --global-batch-size 8, this one has 16"),
        ("--weight-decay 0.5", 8, 1, "0.5 here (--weight-decay, --start-weight-decay)"),
        ("--lr-warmup-iters 2", 8, 1, "0 lr_warmup_steps there, 16 here (--lr-warmup-iters"),
        ("--micro-batch-size 8 --global-batch-size 16", 8, 2, "add --override-opt-param-scheduler to take"),
    ],
)
def test_another_schedule_is_refused_with_its_flag(
    tiny_world: Path, begun: Path, tmp_path: Path, extra: str, steps: int, processes: int, message: str
) -> None:
    before = listing(begun)
    codes, output, err = run(words_of(tiny_world, begun, steps, extra), tmp_path / "logs", processes)
    assert 2 in codes and not steps_in(output), err
    assert_one_sentence(err, message)
    assert listing(begun) == before


def test_a_run_with_metadata_of_version_1_goes_on(tiny_world: Path, begun: Path, tmp_path: Path) -> None:
    file = begun / METADATA_FILE
    content = json.loads(file.read_text())
    del content["method"]
    for entry in (content, content["parent"], *content["data"]):
        entry["stage"] = entry.pop("phase")
    file.write_text(json.dumps(content | {"format_version": 1}))
    words = words_of(tiny_world, begun, 7, "--override-opt-param-scheduler")
    codes, output, err = run(words, tmp_path / "logs")
    assert codes == [0] and steps_in(output) == [7], err


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"], ids=["plain", "distributed optimizer"])
def test_the_flags_that_the_sentence_names(tiny_world: Path, tmp_path: Path, optimizer: str) -> None:
    """More steps at another learning rate; then once more, the saved schedule kept."""
    save = tmp_path / "run"
    for steps, extra, rate in (
        (2, "--lr-decay-style constant", "1.000000E-03"),
        (4, "--lr-decay-style constant --override-opt-param-scheduler --lr 5e-4", "5.000000E-04"),
        (6, "--lr-decay-style constant --use-checkpoint-opt_param-scheduler --lr 7e-4", "5.000000E-04"),
    ):
        codes, output, err = run(words_of(tiny_world, save, steps, f"{optimizer} {extra}"), tmp_path / str(steps))
        assert codes == [0], err
        assert steps_in(output) == [steps - 1, steps]
        assert set(re.findall(r"learning rate: (\S+)", output)) == {rate}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_goes_on_with_another_batch_size_to_its_end(
    tiny_world: Path, stage1_run: Run, tmp_path: Path, stage: int
) -> None:
    """First many, then few at a time: Megatron would have no samples left. Validation does not run dry either."""
    parent = tiny_world / "upcycled" if stage == 1 else stage1_run.directory
    data = tiny_world / ("mono" if stage == 1 else "pairs")
    split = "--split 50,50,0" if stage == 1 else f"--train-data-path {data} --valid-data-path {data}"
    for steps, batch, go_on in (
        (4, 16, ""),
        (8, 4, "--override-opt-param-scheduler"),
        (9, 12, "--override-opt-param-scheduler"),
    ):
        extra = f"--global-batch-size {batch} --eval-iters 2 --eval-interval 2 {split} {go_on}"
        words = train_words(stage, parent, data, tmp_path / "run", steps, extra)
        if stage == 2:
            del words[words.index("--split") : words.index("--split") + 2]
            del words[words.index("--data-path") : words.index("--data-path") + 2]
        codes, output, err = run(words, tmp_path / str(steps))
        assert codes == [0] and steps_in(output)[-1] == steps, err
    assert "consumed samples:           92" in output  # 4 * 16 + 4 * 4 + 12


def test_samples_are_trained_on_whatever_the_batch_size(tiny_world: Path, tmp_path: Path) -> None:
    def go_on(samples: int, batch: int) -> tuple[list[int], str, str]:
        extra = (
            f"--train-samples {samples} --global-batch-size {batch} --micro-batch-size 2 --override-opt-param-scheduler"
        )
        words = words_of(tiny_world, tmp_path / "run", 0, extra)
        del words[words.index("--train-iters") : words.index("--train-iters") + 2]
        return run(words, tmp_path / f"logs{samples}_{batch}")

    assert steps_in(go_on(16, 8)[1]) == [1, 2]
    for batch, steps in ((4, [3, 4, 5, 6]), (8, [])):
        codes, output, err = go_on(32, batch)
        assert codes == [0] and steps_in(output) == steps, err
    assert "holds iteration 6: nothing is left to train" in output


def test_a_finished_run_ends_in_peace(tiny_world: Path, begun: Path, tmp_path: Path) -> None:
    before = listing(begun)
    codes, output, _ = run(words_of(tiny_world, begun, 6), tmp_path / "logs")
    assert codes == [0] and not steps_in(output) and "holds iteration 6: nothing is left to train" in output
    codes, output, _ = run(words_of(tiny_world, begun, 6, "--dry-run"), tmp_path / "dry")
    assert codes == [0] and "stage1: parameters" in output
    assert listing(begun) == before


REFUSED = {
    "warm-up": ("--lr-warmup-iters 10", "take fewer --lr-warmup-iters"),
    "warm-up by a fraction": ("--lr-warmup-fraction 1.0", "take fewer --lr-warmup-iters"),
    "warm-up from above": ("--lr-warmup-init 0.1", "--lr-warmup-init must not be greater than --lr"),
    "index": ("--data-path {bad}/cut", "cut.idx is not the whole index of the"),
    "index of zeros": ("--data-path {bad}/zeros", "zeros.idx is not the whole index of the"),
    "W&B": ("--wandb-project p --save-interval 1", "give --wandb-save-dir DIR, or --save"),
    "batch size": (
        "--global-batch-size 6",
        "--global-batch-size 6 must be a multiple of --micro-batch-size 4 times 1,",
    ),
    "weights of the blend": ("--data-path 0 {world}/mono 1 {world}/mono", "--data-path must be greater than 0"),
    "split": ("--split 0,1,0", "--split 0,1,0 leaves no document of"),
    "dataloader": ("--dataloader-type cyclic", "--dataloader-type cyclic is not supported"),
    "full validation": ("--full-validation", "full_validation=True does not go with Mix-MoE"),
    "rows": ("--vocab-size 600", "--vocab-size is 512 in the checkpoint, not 600"),
    "layers": ("--num-layers 2", "--num-layers is 4 in the checkpoint, not 2"),
    "padded rows": ("--padded-vocab-size 256", "--padded-vocab-size 256 is less than the model's 512 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tiny_world: Path, tmp_path: Path, case: str) -> None:
    extra, message = REFUSED[case]
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("cut", "zeros"):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(tiny_world / f"mono{suffix}", bad / f"{name}{suffix}")
    index = (bad / "cut.idx").read_bytes()
    (bad / "cut.idx").write_bytes(index[:900])
    (bad / "zeros.idx").write_bytes(index[:900] + bytes(len(index) - 900))
    words = words_of(
        tiny_world, None if case == "W&B" else tmp_path / "new", 3, extra.format(bad=bad, world=tiny_world)
    )
    codes, _, err = run(words, tmp_path / "logs")
    assert codes == [2], err
    assert_one_sentence(err, message)
    assert not (tmp_path / "new").exists() and len(list(bad.iterdir())) == 6


@pytest.mark.parametrize("left_out", ["--lr", "--train-iters", "--micro-batch-size", "--seq-length"])
def test_a_flag_that_is_missing_is_named(tiny_world: Path, tmp_path: Path, left_out: str) -> None:
    words = words_of(tiny_world, tmp_path / "new", 3)
    del words[words.index(left_out) : words.index(left_out) + 2]
    codes, _, err = run(words, tmp_path / "logs")
    assert codes == [2], err
    assert_one_sentence(err, f"{left_out} is missing")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_needs_no_schedule(tiny_world: Path, tmp_path: Path) -> None:
    words = f"tools/pretrain_mixmoe.py --mixmoe-stage 1 --init-from {tiny_world}/upcycled --dry-run --seq-length 32 "
    codes, output, err = run([*words.split(), "--micro-batch-size", "1"], tmp_path / "logs")
    assert codes == [0] and "stage1: parameters" in output, err


@pytest.mark.parametrize("documents", [1, 3])
def test_a_first_run_with_little_data_and_few_flags(tiny_world: Path, tmp_path: Path, documents: int) -> None:
    """Fewer tokens than a sample, and no document for validation: Megatron would look for one for ever."""
    lines = (tiny_world / "text.txt").read_text("utf-8").splitlines()[:documents]
    (tmp_path / "few.txt").write_text("\n".join(lines))
    build = f"tools/preprocess_data.py mono --input {tmp_path}/few.txt --tokenizer {tiny_world}/upcycled/tokenizer"
    assert run([*build.split(), "--output-prefix", f"{tmp_path}/few", "--min-tokens", "1"], tmp_path / "build")[0] == [
        0
    ]
    words = f"tools/pretrain_mixmoe.py --mixmoe-stage 1 --init-from {tiny_world}/upcycled --data-path {tmp_path}/few "
    words += "--seq-length 64 --micro-batch-size 1 --train-iters 2 --lr 1e-3 --log-interval 1 --num-workers 0"
    codes, output, err = run(words.split(), tmp_path / "logs")
    assert codes == [0] and steps_in(output) == [1, 2], err
    assert "no validation, and no test: --split 969,30,1 leaves no document of" in output


@pytest.mark.parametrize(
    ("extra", "message"),
    [("", r"iteration 2 on rank 0: .* The learning rate may be too high .*; nothing has been saved\.$"),
     ("--save-interval 1", r"iteration 2 on rank 0: .*; iter_0000001 in .*run is saved, and the same command goes on")],
)  # fmt: skip
def test_a_loss_that_is_not_finite_ends_the_run_with_its_cause(
    tiny_world: Path, tmp_path: Path, extra: str, message: str
) -> None:
    """No word of a GPU, neither in the first step nor later."""
    words = words_of(tiny_world, tmp_path / "run", 6, f"--lr 1e20 --clip-grad 0 --lr-decay-style constant {extra}")
    codes, _, err = run(words, tmp_path / "logs")
    assert codes == [2], err
    assert re.search(message, err.splitlines()[-1]), err
    assert "GPU" not in err.splitlines()[-1]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("extra", ["--skip-train", "--eval-iters 0"])
def test_a_run_goes_on_to_validate_alone_or_no_more(
    tiny_world: Path, stage1_run: Run, tmp_path: Path, stage: int, extra: str
) -> None:
    """What was consumed before is neither in the way of a validation that begins anew, nor of none."""
    parent = tiny_world / "upcycled" if stage == 1 else stage1_run.directory
    data = tiny_world / ("mono" if stage == 1 else "pairs")
    for steps, flags in ((2, ""), (2 if "skip" in extra else 3, f"{extra} --override-opt-param-scheduler")):
        words = train_words(stage, parent, data, tmp_path / "run", steps, f"--eval-iters 2 --eval-interval 1 {flags}")
        del words[words.index("--split") : words.index("--split") + 2]
        place = words.index("--data-path")
        files = [str(data), str(data)]
        words[place : place + 2] = ["--train-data-path", *files, "--valid-data-path", *files]
        codes, output, err = run(words, tmp_path / f"logs{steps}{len(flags)}")
        assert codes == [0], err
    assert ("validation loss at iteration" in output) == ("skip" in extra)
    assert steps_in(output) == ([] if "skip" in extra else [3])
