"""Bad input to the real commands: exit status 2, one clear sentence last on stderr, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_batch import assert_one_sentence, listing, run_batch
from tests.helpers.tiny_hf import tiny_tokenizer
from tests.helpers.training import TINY_RUN, run_command

IMPORT = "checkpoints_conversion/hf_to_mixmoe.py --hf-dir {hf} --output-dir {bad}/out"
MONO = "tools/preprocess_data.py mono --tokenizer {tokenizer} --output-prefix {bad}/new/data --input "
PAIRS = (
    "tools/preprocess_data.py parallel --tokenizer {tokenizer} --output-prefix {bad}/new/data "
    "--source-language de --target-language en --input "
)
TRAIN = f"tools/pretrain_mixmoe.py {TINY_RUN} --train-iters 1 --save {{bad}}/save --data-cache-path {{bad}}/cache"
STAGE_1 = TRAIN + " --mixmoe-stage 1 --init-from {world}/upcycled"

#: case -> (command line, words of the sentence)
CASES: dict[str, tuple[str, str]] = {
    "import: no weights": (IMPORT.replace("{hf}", "{bad}/no_weights"), "neither model.safetensors"),
    "import: truncated weights": (IMPORT.replace("{hf}", "{bad}/truncated"), "not a whole safetensors file"),
    "import: architecture": (IMPORT.replace("{hf}", "{bad}/gpt2"), "GPT2LMHeadModel is not supported"),
    "import: width": (
        IMPORT.replace("{hf}", "{world}/base") + " --num-experts-per-group 3",
        "not divisible by num_experts_per_group=3",
    ),
    "import: option value": (
        IMPORT.replace("{hf}", "{world}/base") + " --spectral-transform wavelet",
        "spectral_transform must be one of fft, dct, random, none, got 'wavelet'",
    ),
    "import: more ids than rows": (
        IMPORT.replace("{hf}", "{bad}/many_ids"),
        "The tokenizer in {bad}/many_ids has 520 ids but the model's embedding has only 512 rows",
    ),
    "train: more ids than rows": (
        TRAIN + " --mixmoe-stage 1 --init-from {bad}/many_ids --data-path {world}/mono --padded-vocab-size 1024 "
        "--make-vocab-size-divisible-by 1024",
        "{bad}/many_ids has 520 ids but the model's embedding has only 512 rows",
    ),
    "mono: more ids than rows": (
        MONO.replace("{tokenizer}", "{bad}/many_ids") + "{world}/text.txt",
        "has 520 ids but",
    ),
    "evaluate: more ids than rows": (
        "tools/evaluate_translation.py --system a={bad}/many_ids --test de-en={world}/pairs.tsv "
        "--output-dir {bad}/report",
        "has 520 ids but the model's embedding has only 512 rows",
    ),
    "export: not ours": (
        "checkpoints_conversion/mixmoe_to_hf.py --checkpoint-dir {world}/base --output-dir {bad}/out",
        "no mixmoe_metadata.json",
    ),
    "evaluate: no model": (
        "tools/evaluate_translation.py --system a={bad}/nothing --test de-en={world}/pairs.tsv "
        "--output-dir {bad}/report",
        "{bad}/nothing",
    ),
    "mono: empty corpus": (MONO + "{bad}/empty.txt", "No document is left"),
    "mono: no file": (MONO + "{bad}/nothing.txt", "Cannot read {bad}/nothing.txt"),
    "mono: no tokenizer": (
        MONO.replace("{tokenizer}", "{bad}/nothing") + "{world}/text.txt",
        "tokenizer directory {bad}/nothing does not exist",
    ),
    "pairs: empty corpus": (PAIRS + "{bad}/header.tsv", "No pair is left"),
    "pairs: missing cell": (PAIRS + "{bad}/cell.tsv", "{bad}/cell.tsv, line 3: 1 columns where the header has 2"),
    "pairs: missing column": (PAIRS + "{bad}/column.tsv", "{bad}/column.tsv, line 1: no column 'en'"),
    "train: no phase": (
        TRAIN,
        "give --phase, one of dense, stage1, stage2, ",
    ),
    "train: stage 3": (TRAIN + " --mixmoe-stage 3", "--mixmoe-stage must be one of 0, 1, 2; got 3"),
    "train: stage not a number": (TRAIN + " --mixmoe-stage one", "argument --mixmoe-stage: invalid int value: 'one'"),
    "train: no --init-from": (TRAIN + " --mixmoe-stage 1", "give --init-from DIR"),
    "train: empty --load": (TRAIN + " --mixmoe-stage 1 --load {bad}/nothing", "{bad}/nothing holds no checkpoint yet"),
    "train: no directory": (TRAIN + " --mixmoe-stage 1 --init-from {bad}/nothing", "no mixmoe_metadata.json"),
    "train: stage 2 of upcycled": (
        TRAIN + " --mixmoe-stage 2 --init-from {world}/upcycled --data-path {world}/pairs",
        "'upcycled', but this step needs 'stage1': train stage 1 first",
    ),
    "train: stage 0 of upcycled": (TRAIN + " --mixmoe-stage 0 --init-from {world}/upcycled", "needs 'dense'"),
    "train: backend": (STAGE_1 + " --experts-backend foo", "argument --experts-backend: invalid choice: 'foo'"),
    "train: Megatron's choice": (STAGE_1 + " --lr-decay-style foo", "argument --lr-decay-style: invalid choice: 'foo'"),
    "train: unknown flag": (STAGE_1 + " --nonsense", "unrecognized arguments: --nonsense"),
    "train: no data": (STAGE_1, "no training data: give --data-path"),
    "train: no data file": (STAGE_1 + " --data-path {bad}/nothing", "{bad}/nothing.bin does not exist"),
    "train: both kinds": (STAGE_1 + " --data-path {world}/mono {world}/pairs", "mixes monolingual and parallel data"),
    "train: packed monolingual text": (STAGE_1 + " --data-path {world}/mono --pack", "--pack is for parallel data"),
    "train: another tokenizer": (STAGE_1 + " --data-path {bad}/other", "built with another tokenizer"),
    "train: experts by ranks": (
        STAGE_1 + " --data-path {world}/mono --expert-model-parallel-size 3",
        "num_experts_per_group=4 is not divisible by expert_model_parallel_size=3",
    ),
    "train: no save interval": (STAGE_1 + " --data-path {world}/mono", "--save-interval is missing"),
    "train: too few processes": (
        STAGE_1 + " --data-path {world}/mono --save-interval 5 --pipeline-model-parallel-size 2",
        "Megatron refuses these arguments: world size (1) is not divisible by",
    ),
}


@pytest.fixture(scope="module")
def bad(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of damaged input."""
    directory = tmp_path_factory.mktemp("bad")
    for name in ("no_weights", "truncated", "gpt2"):
        shutil.copytree(tiny_world / "base", directory / name)
    (directory / "no_weights" / "model.safetensors").unlink()
    weights = directory / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = directory / "gpt2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["GPT2LMHeadModel"]}))
    shutil.copytree(tiny_world / "base", directory / "many_ids")
    path = directory / "many_ids" / "tokenizer.json"
    content = json.loads(path.read_text())
    known = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    more = range(max(known.values()) + 1, 520)
    content["added_tokens"] += [{**content["added_tokens"][0], "id": id, "content": f"<extra_{id}>"} for id in more]
    path.write_text(json.dumps(content))
    texts = {"empty.txt": "", "header.tsv": "de\ten\n", "cell.tsv": "de\ten\na\tb\nc\n", "column.tsv": "de\tfr\na\tb\n"}
    for name, text in texts.items():
        (directory / name).write_text(text, "utf-8")
    tiny_tokenizer(directory / "other_tokenizer", "bpe")
    return directory


@pytest.fixture(scope="module")
def results(tiny_world: Path, bad: Path) -> dict[str, dict[str, Any]]:
    """What each case did; one process runs them all, after it has built data with another tokenizer."""
    places = {"world": tiny_world, "bad": bad, "tokenizer": tiny_world / "upcycled" / "tokenizer"}
    build = f"{MONO} {tiny_world}/text.txt".replace("{tokenizer}", "{bad}/other_tokenizer")
    lines = [build.replace("{bad}/new/data", "{bad}/other"), "tools/pretrain_mixmoe.py --help"]
    lines += [line for line, _ in CASES.values()]
    done = run_batch([line.format(**places) for line in lines], bad)
    return dict(zip(["build", "help", *CASES], done, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(
    tiny_world: Path, bad: Path, results: dict[str, dict[str, Any]], case: str
) -> None:
    message = CASES[case][1].format(world=tiny_world, bad=bad)
    result = results[case]
    assert result["status"] == 2, result["err"]
    assert_one_sentence(result["err"], message)
    assert result["changed"] == []


def test_help_is_shown_without_a_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    assert results["build"]["status"] == 0, results["build"]["err"]
    assert results["help"]["status"] == 0 and results["help"]["changed"] == []
    for flag in ("--mixmoe-stage", "--init-from", "--tensor-model-parallel-size"):
        assert flag in results["help"]["out"]


def test_as_a_user_runs_it(tiny_world: Path, bad: Path) -> None:
    """In a process of its own, what Python and Megatron say at exit included."""
    line, message = CASES["train: stage 2 of upcycled"]
    before = listing(bad), listing(tiny_world)
    done = run_command(*line.format(world=tiny_world, bad=bad).split(), check=False)
    assert done.returncode == 2
    assert_one_sentence(done.stderr, message)
    assert (listing(bad), listing(tiny_world)) == before
