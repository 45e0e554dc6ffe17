"""An evaluation killed again and again gives the files of an undisturbed one; changed input is never mixed in."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.crashes import die_at_change, die_at_size, file_size_limit_from, record_changes
from tests.helpers.forked import Job
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense, tiny_mixmoe, tiny_tokenizer

DECODING = "--num-beams 2 --max-new-tokens 6 --batch-size 2"
RESTARTED = 19  # changes on the disk that each start makes before the first that is new: manifest, sources, references
PARTIAL = "hypotheses/de-en.base.partial.jsonl"


class Evaluation:
    """An evaluation of two systems in two directions and two languages, to be started as often as it takes."""

    def __init__(self, world: Path, directory: Path) -> None:
        self.output, self._directory, self._starts = directory / "evaluation", directory, 0
        data = f"--test de-en={world}/test.tsv --both-directions --mono de={world}/de.txt --mono en={world}/en.txt"
        models = f"--system base={world}/base --system mixmoe={world}/mixmoe --baseline base --comet off"
        line = f"tools/evaluate_translation.py {models} {data} {DECODING} --output-dir {self.output}"
        self.words = line.split()

    def start(self, *more: str, prelude: Callable[[], None] | None = None) -> Job:
        self._starts += 1
        return Job([*self.words, *more], 1, self._directory / f"logs{self._starts}", prelude=prelude)

    def run(self, *more: str, status: int = 0, prelude: Callable[[], None] | None = None) -> str:
        """Run to the end or the expected failure, and return what was printed, stderr last."""
        job = self.start(*more, prelude=prelude)
        assert job.wait() == [status], job.output()[-8000:]
        return job.stdout(0) + (job.logs / "0.err").read_text("utf-8")

    def kill_at_change(self, number: int) -> bool:
        """Start, to be killed just before the change of this number; False when the run came to its end before."""
        job = self.start(prelude=die_at_change(self.output, 0, number))
        codes = job.wait()
        assert codes in ([0], [-signal.SIGKILL]), job.output()[-8000:]
        return codes != [0]

    def results(self) -> dict[str, str]:
        """Every file of the directory, without what tells times, places and the commit."""
        paths = (path for path in self.output.rglob("[!.]*") if path.is_file())
        files = {str(path.relative_to(self.output)): path.read_text("utf-8") for path in paths}
        for name in files:
            if name == "evaluation.json" or name.startswith("measurements/"):
                value = json.loads(files[name])
                for key in ("seconds", "commit"):
                    value.pop(key, None)
                files[name] = json.dumps(value)
        return files


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation_world")
    save_tiny_dense(directory / "base", "qwen2")
    tiny_mixmoe("qwen2", stage=2).save_pretrained(directory / "mixmoe")
    tiny_tokenizer(directory / "mixmoe")
    pairs = [f"{a}\t{b}" for a, b in pairwise(SENTENCES[1:8])]
    (directory / "test.tsv").write_text("\n".join(["de\ten", *pairs]) + "\n", "utf-8")
    for code, line in (("de", SENTENCES[2]), ("en", SENTENCES[1])):
        (directory / f"{code}.txt").write_text(f"{line}\n{line[::2]}\n", "utf-8")
    return directory


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """One run to the end; what it changed on the disk is in the file changes.0 beside its directory."""
    evaluation = Evaluation(world, tmp_path_factory.mktemp("undisturbed"))
    evaluation.run(prelude=record_changes(evaluation.output, evaluation.output.parent / "changes"))
    return evaluation


def changes_of(undisturbed: Evaluation) -> list[str]:
    return (undisturbed.output.parent / "changes.0").read_text("utf-8").splitlines()


def kill_at_times(evaluation: Evaluation, count: int, numbers: random.Random, longest: float) -> None:
    """Kill at random moments, seconds after the start, of a run that is then started again."""
    for _ in range(count):
        job = evaluation.start()
        time.sleep(numbers.uniform(0, longest))
        job.kill()
        assert job.wait() in ([0], [-signal.SIGKILL]), job.output()[-8000:]


def test_kills_one_after_the_other(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    """On a full disk, in the middle of a batch; then at changes on the disk, each past the last; then at any moment."""
    evaluation, numbers = Evaluation(world, tmp_path), random.Random(5)
    printed = evaluation.run(status=2, prelude=file_size_limit_from(evaluation.output, 0, PARTIAL, 200))
    assert "make room and start the same command again" in printed.splitlines()[-1]
    torn = evaluation.start(prelude=die_at_size(evaluation.output, 0, PARTIAL, 250))
    assert torn.wait() == [-signal.SIGXFSZ]
    assert len((evaluation.output / PARTIAL).read_bytes()) == 250
    for _ in range(9):
        assert evaluation.kill_at_change(RESTARTED + numbers.randint(5, 13))
    assert len(list(evaluation.output.glob("hypotheses/*.mixmoe.txt"))) == 2
    kill_at_times(evaluation, 2, numbers, 1.5)
    evaluation.run()
    assert evaluation.results() == undisturbed.results()


def test_no_change_is_missing_from_the_count(undisturbed: Evaluation) -> None:
    """What each start repeats is RESTARTED changes, and every file is renamed into its place."""
    changes = changes_of(undisturbed)
    assert changes[RESTARTED] == f"open {PARTIAL}", changes[: RESTARTED + 3]
    opened = {line.partition(" ")[2] for line in changes if line.startswith("open ")}
    assert {path for path in opened if ".tmp" not in path} == {
        f"hypotheses/{direction}.{system}.partial.jsonl"
        for direction in ("de-en", "en-de")
        for system in ("base", "mixmoe")
    }


def test_interrupted_by_hand(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    evaluation = Evaluation(world, tmp_path)
    interrupt = partial(_raise_at_open, str(evaluation.output / "hypotheses" / "en-de.base.partial.jsonl"))
    printed = evaluation.run(status=130, prelude=interrupt)
    assert printed.rstrip().endswith(f"interrupted: the same command goes on in {evaluation.output}.")
    assert "Traceback" not in printed
    assert (evaluation.output / "hypotheses" / "de-en.base.txt").exists()
    printed = evaluation.run()
    assert "base: translate de-en" not in printed and "base: translate en-de" in printed
    assert evaluation.results() == undisturbed.results()
    hypotheses = evaluation.output / "hypotheses" / "de-en.base.txt"
    hypotheses.write_text(hypotheses.read_text("utf-8") + "one more\n", "utf-8")
    last = evaluation.run(status=2).splitlines()[-1]
    assert last == f"error: {hypotheses} has 7 hypotheses for 6 references: delete it to decode anew."


def _raise_at_open(path: str) -> None:
    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) == path:
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(on_event)


def test_without_nltk(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    """METEOR is left out and one line says so; chrF takes its place. With NLTK again, the scores are as before."""
    evaluation = Evaluation(world, tmp_path)
    shutil.copytree(undisturbed.output, evaluation.output)
    printed = evaluation.run(prelude=_hide_nltk)
    assert "no METEOR: NLTK is not installed; pip install 'mixmoe-megatron[meteor]' adds it" in printed
    assert "B BLEU, F chrF" in evaluation.results()["comparison.md"]
    assert "meteor" not in evaluation.results()["evaluation.json"]
    evaluation.run()
    assert evaluation.results() == undisturbed.results()


def _hide_nltk() -> None:
    sys.modules["nltk"] = None  # type: ignore[assignment]  # as if it were not installed


def test_what_was_decoded_otherwise_is_not_taken(world: Path, tmp_path: Path) -> None:
    """One direction is finished and another begun; then the model, the test set or an option is another one."""
    own = tmp_path / "world"
    shutil.copytree(world, own)
    torn = Evaluation(own, tmp_path)
    path = "hypotheses/en-de.base.partial.jsonl"
    assert torn.start(prelude=die_at_size(torn.output, 0, path, 20)).wait() == [-signal.SIGXFSZ]
    before = torn.results()
    test_set, weights = own / "test.tsv", own / "base" / "model.safetensors"
    edited, retrained = test_set.read_bytes().replace(b"garden", b"park"), bytearray(weights.read_bytes())
    retrained[-100] ^= 1
    for message, flags, file, content in (
        ("max new tokens was 6 and is now 7", "--max-new-tokens 7", None, b""),
        ("num beams was 2 and is now 3", "--num-beams 3", None, b""),
        ("decoding was 'beam' and is now 'greedy'", "--decoding greedy", None, b""),
        ("systems base was", "", weights, retrained),
        ("test sets de-en was", "", test_set, edited),
    ):
        original = file.read_bytes() if file else b""
        if file:
            file.write_bytes(content)
        last = torn.run(*flags.split(), status=2).splitlines()[-1]
        assert last.startswith("error: ") and message in last and last.endswith("overwrite it with --overwrite.")
        assert torn.results() == before
        if file and file != test_set:
            file.write_bytes(original)
    torn.run("--overwrite")
    afresh = Evaluation(own, tmp_path / "afresh")
    afresh.run()
    assert torn.results() == afresh.results()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_before_each_change_on_the_disk(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    """One run for each, killed there and started again to the end."""
    expected = undisturbed.results()
    for number, change in enumerate(changes_of(undisturbed)):
        evaluation = Evaluation(world, tmp_path / str(number))
        assert evaluation.kill_at_change(number), change
        evaluation.run()
        assert evaluation.results() == expected, change


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    for seed in range(4):
        evaluation = Evaluation(world, tmp_path / str(seed))
        kill_at_times(evaluation, 8, random.Random(seed), 2.0)
        evaluation.run()
        assert evaluation.results() == undisturbed.results()


@pytest.mark.slow
def test_kills_in_an_overwrite(world: Path, undisturbed: Evaluation, tmp_path: Path) -> None:
    """What is left of the old results is discarded or refused, never taken."""
    for number in range(0, 16, 2):
        evaluation = Evaluation(world, tmp_path / str(number))
        evaluation.run("--max-new-tokens", "3")
        job = evaluation.start("--overwrite", prelude=die_at_change(evaluation.output, 0, number))
        assert job.wait() == [-signal.SIGKILL], job.output()[-8000:]
        restarted = evaluation.start()
        if restarted.wait() == [2]:
            assert "max new tokens was 3 and is now 6" in restarted.output()
            evaluation.run("--overwrite")
        assert evaluation.results() == undisturbed.results()
