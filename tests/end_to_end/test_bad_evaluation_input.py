"""Bad input to the evaluation and data commands: exit status 2, one clear sentence, nothing written."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.command_batch import assert_one_sentence, run_batch
from tests.helpers.tiny_hf import save_tiny_dense

EVALUATE = "tools/evaluate_translation.py --output-dir {bad}/report --decoding greedy --max-new-tokens 2"
TEST = EVALUATE + " --system a={world}/base --test "
PAIRS_TSV = TEST + "de-en={world}/pairs.tsv"
MONO = EVALUATE + " --system a={world}/base --mono "
OTHER_DIRECTORY = PAIRS_TSV.replace("{bad}/report", "{bad}/DIRECTORY")
PREPARE = "tools/prepare_data.py --output-dir {bad}/prepared_now"
TOKENIZE = (
    "tools/preprocess_data.py parallel --tokenizer {world}/base --output-prefix {bad}/new/data "
    "--source-language de --target-language en --input "
)
CHECK = "tools/check_tokenizer.py --tokenizer {world}/base --mono "
INSPECT = "tools/inspect_routing.py --model {world}/base --output-dir {bad}/routing --mono "
NO_COLUMN = "no column 'en'; it has de, fr: name one of these."
NO_EOS = "has no end-of-sequence token; set eos_token in tokenizer_config.json."

#: case -> (command line, words of the sentence)
CASES: dict[str, tuple[str, str]] = {
    "TSV column": (TEST + "de-en={bad}/column.tsv", "line 1: no column 'en' in the header; it has de, fr: name one"),
    "JSONL column": (TEST + "de-en={bad}/column.jsonl", NO_COLUMN),
    "Parquet column": (TEST + "de-en={bad}/column.parquet", NO_COLUMN),
    "empty file": (TEST + "de-en={bad}/empty.tsv", "{bad}/empty.tsv is empty: a TSV file begins with a line of column"),
    "empty test set": (TEST + "de-en={bad}/header.tsv", "{bad}/header.tsv holds no test segment: give a test set with"),
    "broken JSONL": (TEST + "de-en={bad}/broken.jsonl", "{bad}/broken.jsonl, segment 2: the row is broken"),
    "broken Parquet": (TEST + "de-en={bad}/broken.parquet", "{bad}/broken.parquet: not a readable Parquet file"),
    "torn gzip": (TEST + "de-en={bad}/torn.tsv.gz", "{bad}/torn.tsv.gz: broken gzip data"),
    "no test file": (TEST + "de-en={bad}/nothing.tsv", "{bad}/nothing.tsv does not exist or is not a file."),
    "not a test set": (TEST + "{world}/pairs.tsv", "--test takes PAIR[@NAME]=FILE, such as de-en=test.tsv.gz, not"),
    "language": (TEST + "de-xy={world}/pairs.tsv", "Unknown language code 'xy': give one of ar, "),
    "one language": (TEST + "de-de={world}/pairs.tsv", "Source and target language are both 'de'."),
    "monolingual language": (MONO + "xy={world}/text.txt", "Unknown language code 'xy': give one of ar, "),
    "no monolingual file": (MONO + "de={bad}/nothing.txt", "Cannot read {bad}/nothing.txt: No such file or directory."),
    "no monolingual text": (MONO + "de={bad}/empty.tsv", "{bad}/empty.tsv holds no text: give a file with"),
    "monolingual encoding": (MONO + "de={bad}/latin.txt", "{bad}/latin.txt, line 2: not UTF-8"),
    "FLORES language": (TEST + "de-en=flores:{bad}/flores", "There is no {bad}/flores/devtest/eng_Latn.devtest: give"),
    "FLORES directory": (TEST + "de-en=flores:{bad}/no", "There is no {bad}/no/devtest/deu_Latn.devtest: give FLORES"),
    "FLORES lengths": (
        TEST + "de-cs=flores:{bad}/flores",
        "ces_Latn.devtest ends after line 1, the other side goes on",
    ),
    "sacreBLEU name": (TEST + "de-en=sacrebleu:wmt99", "no test set 'wmt99' for de-en: `sacrebleu --list` names those"),
    "sacreBLEU pair": (TEST + "de-et=sacrebleu:wmt17", "sacreBLEU has no test set 'wmt17' for de-et: it has cs-en, "),
    "sacreBLEU offline": (TEST + "de-en=sacrebleu:wmt17", "Cannot fetch the sacreBLEU test set wmt17 for de-en ("),
    "sacreBLEU torn": (TEST + "de-en=sacrebleu:wmt18", "test set wmt18 for de-en ([Errno 2] No such file"),
    "no EOS": (EVALUATE + " --system a={bad}/no_eos --test de-en={world}/pairs.tsv", NO_EOS),
    "no EOS in the second": (PAIRS_TSV + " --system b={bad}/no_eos", NO_EOS),
    "damaged weights": (PAIRS_TSV + " --system b={bad}/torn", "{bad}/torn/model.safetensors is damaged ("),
    "no weights": (PAIRS_TSV + " --system b={bad}/no_weights", "System 'b': {bad}/no_weights holds no weights"),
    "no model": (PAIRS_TSV + " --system b={bad}/flores", "{bad}/flores is not a Hugging Face model directory"),
    "COMET path": (PAIRS_TSV + " --comet {bad}/nothing", "'{bad}/nothing' cannot be used (Model '{bad}/nothing' not"),
    "COMET name": (PAIRS_TSV + " --comet Unbabel/nothing", "or leave COMET out (--comet off)."),
    "COMET settings": (PAIRS_TSV + " --comet {bad}/broken.jsonl", "(there is no "),
    "target tokenizer": (
        TEST + "de-ja={world}/pairs.tsv --target-column en",
        "BLEU into 'ja' needs sacreBLEU's optional tokenizer: pip install 'sacrebleu[ja]'.",
    ),
    "device": (PAIRS_TSV + " --device tpu0", "The device 'tpu0' cannot be used here: "),
    "dtype": (PAIRS_TSV + " --dtype int3", "The dtype must be one of auto, float32, bfloat16, float16, not 'int3'."),
    "template": (PAIRS_TSV + " --prompt-template {bad}/latin.txt", "Cannot read the prompt template {bad}/latin.txt"),
    "output is a file": (OTHER_DIRECTORY.replace("DIRECTORY", "empty.tsv"), "is a file: choose another output"),
    "output of another command": (
        OTHER_DIRECTORY.replace("DIRECTORY", "prepared") + " --overwrite",
        "{bad}/prepared/manifest.json is not an evaluation's: choose another output directory.",
    ),
    "output without manifest": (
        OTHER_DIRECTORY.replace("DIRECTORY", "orphan"),
        "{bad}/orphan holds results of a, and its manifest.json does not say of which model: choose another",
    ),
    "prepare: column": (PREPARE + " --parallel de-en.train={bad}/column.jsonl", NO_COLUMN),
    "prepare: empty": (PREPARE + " --parallel de-en.train={bad}/header.tsv", "no line is left of {bad}/header.tsv (0"),
    "prepare: language": (PREPARE + " --mono xy.train={world}/text.txt", "Unknown language code 'xy': give one of ar,"),
    "prepare: no file": (PREPARE + " --mono de.train={bad}/nothing.txt", "{bad}/nothing.txt does not exist or is not"),
    "prepare: FLORES": (
        PREPARE + " --parallel de-en.train={world}/pairs.tsv --flores {bad}/flores",
        "eng_Latn.devtest",
    ),
    "prepare: output is a file": (
        PREPARE.replace("prepared_now", "empty.tsv") + " --mono de.train={world}/text.txt",
        "{bad}/empty.tsv is a file: choose another output directory.",
    ),
    "pairs: Parquet": (TOKENIZE + "{bad}/column.parquet", "give TSV or JSONL; tools/prepare_data.py makes TSV of"),
    "pairs: no EOS": ((TOKENIZE + "{world}/pairs.tsv").replace("{world}/base", "{bad}/no_eos"), NO_EOS),
    "check: no text": (CHECK + "de={bad}/empty.tsv", "{bad}/empty.tsv holds no text to measure the tokenizer on."),
    "check: language": (CHECK + "xy={world}/text.txt", "Unknown language code 'xy': give one of ar, "),
    "inspect: dense model": (INSPECT + "de={world}/text.txt", "is not a Mix-MoE model: it has no routers to inspect."),
    "inspect: no file": (INSPECT + "de={bad}/nothing.txt", "Cannot read {bad}/nothing.txt: No such file or directory."),
    "report: not an evaluation": (
        "tools/write_report.py --evaluation {bad}/prepared/manifest.json --output-dir {bad}/page",
        "This is not an evaluation.json of tools/evaluate_translation.py: baseline is missing.",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text that are in order."""
    directory = tmp_path_factory.mktemp("world")
    save_tiny_dense(directory / "base")
    (directory / "pairs.tsv").write_text("de\ten\nHaus\tHouse\nBaum\tTree\n", "utf-8")
    (directory / "text.txt").write_text("Haus\nBaum\n", "utf-8")
    return directory


@pytest.fixture(scope="module")
def bad(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of damaged input, and of results of other commands."""
    directory = tmp_path_factory.mktemp("bad")
    texts = {
        "empty.tsv": "", "header.tsv": "de\ten\n", "column.tsv": "de\tfr\na\tb\n", "broken.parquet": "PAR1....",
        "column.jsonl": '{"de": "a", "fr": "b"}\n', "broken.jsonl": '{"de": "a", "en": "b"}\nx\n',
        "prepared/manifest.json": '{"files": {}}',
        "flores/devtest/deu_Latn.devtest": "a\nb\n", "flores/devtest/ces_Latn.devtest": "a\n",
        "orphan/hypotheses/de-en.a.txt": "x\ny\n", "sacrebleu/wmt18/raw/wmt18.test.tgz": "half",
    }  # fmt: skip
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, "utf-8")
    (directory / "latin.txt").write_bytes(b"ok\nGr\xfc\xdfe\n")
    (directory / "torn.tsv.gz").write_bytes(gzip.compress(b"de\ten\na\tb\n")[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"de": ["a"], "fr": ["b"]}), directory / "column.parquet")
    for name in ("no_eos", "torn", "no_weights"):
        shutil.copytree(world / "base", directory / name)
    files = (directory / "no_eos" / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    for file in filter(Path.exists, files):  # transformers 5 writes the first only
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "eos_token": None}), "utf-8")
    weights = directory / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (directory / "no_weights" / "model.safetensors").unlink()
    return directory


@pytest.fixture(scope="module")
def results(world: Path, bad: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case did; one process runs them all, without a network (a proxy that refuses)."""
    cache = tmp_path_factory.mktemp("cache") / "sacrebleu"
    shutil.copytree(bad / "sacrebleu", cache)
    offline = {"SACREBLEU": str(cache), "https_proxy": "http://localhost:9", "http_proxy": "http://localhost:9"}
    lines = [line.format(world=world, bad=bad) for line, _ in CASES.values()]
    return dict(zip(CASES, run_batch(lines, bad, {**offline, "HF_HUB_OFFLINE": "1"}), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(
    world: Path, bad: Path, results: dict[str, dict[str, Any]], case: str
) -> None:
    result = results[case]
    assert result["status"] == 2, result["err"]
    assert_one_sentence(result["err"], CASES[case][1].format(world=world, bad=bad))
    assert result["changed"] == []
