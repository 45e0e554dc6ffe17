"""Every command in odd but legal surroundings: each works, or says in one sentence what is missing.

Read-only or absent home, unwritable or full temporary folder, C locale, output that is Latin-1 or ASCII, another
working directory; paths with blanks, brackets and letters outside ASCII everywhere.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints_conversion import hf_to_mixmoe
from tests.helpers.command_batch import ROOT, assert_one_sentence, clean_environment, run_batch
from tests.helpers.refusals import refusing_environment
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense
from tests.helpers.training import make_tiny_data, train, train_words

#: home, temporary folder, and other variables; an error's number: that folder refuses changes with it
SURROUNDINGS: dict[str, tuple[int, int, dict[str, str]]] = {
    "another working directory": (0, 0, {}),
    "read-only home, C locale": (errno.EROFS, 0, {"LC_ALL": "C", "LANG": "C"}),
    "no home, unwritable temporary folder, Latin-1": (errno.ENOENT, errno.EACCES, {"PYTHONIOENCODING": "latin-1"}),
    "unwritable home, full temporary folder, ASCII": (errno.EACCES, errno.ENOSPC, {"PYTHONIOENCODING": "ascii"}),
}
CONVERSION = "checkpoints_conversion"
#: where libraries keep things that a home may not hold
NOWHERE = dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"), "")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data and a checkpoint of stage 1, below a folder with an odd name."""
    directory = tmp_path_factory.mktemp("a") / "wörld [x] 世界"
    directory.mkdir()
    save_tiny_dense(directory / "base", "qwen2")
    words = ["--hf-dir", directory / "base", "--output-dir", directory / "upcycled", "--moe-every", "2"]
    assert hf_to_mixmoe.main(list(map(str, words))) == 0
    make_tiny_data(directory, directory / "upcycled" / "tokenizer")
    train(1, directory / "upcycled", directory / "mono", directory / "stage1", 1)
    for code in ("en", "fi"):
        rows = "".join(f"{text.replace(chr(10), ' ')}\tHouse {n}\n" for n, text in enumerate(SENTENCES))
        (directory / f"tëst [{code}].tsv").write_text(f"de\t{code}\n{rows}", "utf-8")
    (directory / "p.yaml").write_text(
        f"monolingual: {{no: {{train: '{directory}/text.txt'}}}}\n"
        f"parallel:\n  de-en: {{test: '{directory}/tëst [en].tsv'}}\n",
        "utf-8",
    )
    return directory


def commands(world: Path, out: Path) -> dict[str, list[str | Path]]:
    """Every command that can be run in one process with others, in an order in which each finds what it needs."""
    tests = [word for code in ("en", "fi") for word in ("--test", f"de-{code}={world}/tëst [{code}].tsv")]
    tokenizer, stage1, results = ["--tokenizer", world / "base"], world / "stage1", out / "ëval" / "evaluation.json"
    return {
        "import": [f"{CONVERSION}/hf_to_mixmoe.py", "--hf-dir", world / "base", "--output-dir", out / "up [1]"],
        "copy": [f"{CONVERSION}/add_mt_experts.py", "--checkpoint-dir", stage1, "--output-dir", out / "s2"],
        "export": [f"{CONVERSION}/mixmoe_to_hf.py", "--checkpoint-dir", stage1, "--output-dir", out / "hf"],
        "parity": [f"{CONVERSION}/check_parity.py", "--hf-dir", out / "hf", "--checkpoint-dir", stage1],
        "check": ["tools/check_checkpoint.py", stage1, "--full"],
        "tokens": ["tools/check_tokenizer.py", *tokenizer, "--mono", f"de={world}/text.txt"],
        "prepare": ["tools/prepare_data.py", "--protocol", world / "p.yaml", "--output-dir", out / "prëpared"],
        "mono": ["tools/preprocess_data.py", "mono", "--input", out / "prëpared" / "mono.no.train.txt.gz", *tokenizer,
                 "--output-prefix", out / "mönö"],
        "pairs": ["tools/preprocess_data.py", "parallel", "--input", world / "tëst [en].tsv", *tokenizer,
                  "--source-language", "de", "--target-language", "en", "--output-prefix", out / "p [1]"],
        "blend": ["tools/preprocess_data.py", "blend", world / "mono", out / "mönö"],
        "evaluate": ["tools/evaluate_translation.py", "--system", f"a={world}/base", "--system", f"b={out}/hf",
                     "--baseline", "a", *tests, "--limit", "2", "--mono", f"de={world}/text.txt", "--mono-limit", "2",
                     "--decoding", "greedy", "--max-new-tokens", "2", "--output-dir", out / "ëval"],
        "report": ["tools/write_report.py", "--evaluation", results, "--output-dir", out / "rëport"],
        "transfer": ["tools/transfer_matrix.py", "--evaluation", results, "--trained", "b=de-en",
                     "--output-dir", out / "transfer [1]"],
        "inspect": ["tools/inspect_routing.py", "--checkpoint-dir", stage1, "--mono", f"dë [1]={world}/text.txt",
                    "--limit", "2", "--output-dir", out / "routing"],
        "plan": ["tools/plan_cluster.py", "--hf-config", world / "base", "--stage", "1", "--gpus", "8", "--gpu-type",
                 "H100", "--global-batch-size", "8", "--seq-length", "64", "--num-experts-per-group", "4"],
        "generation": ["tools/benchmark_generation.py", "--hf-dir", world / "base", "--batch-size", "1", "--turns", "1",
                       "--prompt-length", "2", "--new-tokens", "2", "--output", out / "génération.json"],
        "study": ["tools/study.py", "--grid", ROOT / "examples/study/study.yaml", "--base", world / "base",
                  "--data", ROOT / "examples/data", "--dry-run", "--output-dir", out / "stüdy"],
        "card": ["tools/fairseq2_card.py", out / "hf", "--name", "kärte", "--output-dir", out / "cards"],
        "fairseq2": ["tools/fairseq2_translate.py", "--model", "kärte", "--input", world / "text.txt", "--output",
                     out / "translations", "--source-language", "de", "--target-language", "en"],
        "startup": ["tools/benchmark_startup.py", "--commands", "plan", "routing", "--turns", "1"],
        "conversion": ["tools/benchmark_conversion.py", "--directory", world / "text.txt", "--repeats", "1"],
    }  # fmt: skip


def own_processes(world: Path, out: Path) -> dict[str, list[str | Path]]:
    """The commands that set Megatron up, which a process can do but once."""
    training = train_words(1, world / "upcycled", world / "mono", out / "stägë1", 1)
    training[training.index("--data-cache-path") + 1] = str(out / "cäche")
    return {
        "train": list(training),
        "step": ["tools/benchmark_step.py", "--hf-dir", world / "base", "--batch-size", "1", "--seq-length", "16",
                 "--steps", "1", "--output", out / "bench [1].json"],
        "layer": ["tools/benchmark_layer.py", "--hidden-size", "64", "--ffn-hidden-size", "256", "--tokens", "16",
                  "--turns", "1", "--stages", "1", "--backends", "sequential", "--output", out / "läyer.json"],
    }  # fmt: skip


def environment(name: str, world: Path, tmp_path: Path) -> dict[str, str]:
    """The variables of a surrounding; what is written for the test itself lies below `tmp_path`."""
    home, scratch, variables = SURROUNDINGS[name]
    folders = {str(tmp_path / "home"): home, str(tmp_path / "scratch"): scratch}
    for folder in folders:
        Path(folder).mkdir()
    refused = {folder: number for folder, number in folders.items() if number}
    if scratch:
        refused |= dict.fromkeys(map("/".__add__, ("tmp", "var/tmp", "usr/tmp")), scratch)  # Python's next choices
    result = {**NOWHERE, "HOME": "" if home == errno.ENOENT else str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result |= {"TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1", **variables}
    return result | refusing_environment(tmp_path / "site", ROOT, refused, [tmp_path / "oüt [1] x", tmp_path / "cwd"])


def test_no_command_is_left_out() -> None:
    place = Path()
    swept = {str(words[0]) for words in (commands(place, place) | own_processes(place, place)).values()}
    assert swept == {
        str(path.relative_to(ROOT)) for folder in ("tools", CONVERSION) for path in (ROOT / folder).glob("*.py")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_command_works_or_says_why_not(name: str, world: Path, tmp_path: Path) -> None:
    out, cwd = tmp_path / "oüt [1] x", tmp_path / "cwd"
    for folder in (out, cwd):
        folder.mkdir()
    variables = environment(name, world, tmp_path)
    alone = {
        key: subprocess.Popen(
            [sys.executable, *map(str, [ROOT / words[0], *words[1:]])], cwd=cwd, env=clean_environment(variables),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )
        for key, words in own_processes(world, out).items()
    }  # fmt: skip
    together = commands(world, out)
    lines = [list(map(str, [ROOT / words[0], *words[1:]])) for words in together.values()]
    results: dict[str, dict[str, Any]] = dict(zip(together, run_batch(lines, cwd, variables, cwd), strict=True))
    for key, process in alone.items():
        printed, err = process.communicate(timeout=200)
        results[key] = {"status": process.returncode, "out": printed, "err": err}
    wrong = {}
    for key, result in results.items():
        if key == "conversion":
            assert_one_sentence(result["err"], "text.txt")
        elif key == "fairseq2":
            assert_one_sentence(result["err"], "fairseq2 is not installed")
        elif result["status"] or "Traceback" in result["err"] or "Exception ignored" in result["err"]:
            wrong[key] = f"status {result['status']}: {result['out'][-500:]}\n{result['err'][-3000:]}"
    assert not wrong, "\n".join(f"--- {key}: {text}" for key, text in wrong.items())
    left = [path.name for path in cwd.iterdir() if path.name.partition("_")[0] != "torchinductor"]
    assert not left, "nothing is left where the command was called but what torch keeps in a temporary folder"
    assert "n Σ f P" in results["evaluate"]["out"] or "n \\u03a3 f P" in results["evaluate"]["out"]
