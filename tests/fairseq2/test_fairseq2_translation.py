"""Translation in fairseq2: what Hugging Face decodes greedily, prompts of any lengths, and the traps that it avoids."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmoe_megatron.data.prompts import PromptTemplate, encode_prompts
from mixmoe_megatron.evaluation.generation import GenerationOptions, translate
from mixmoe_megatron.evaluation.models import load_model
from mixmoe_megatron.hf import MixMoEForCausalLM
from tests.helpers.fairseq2_models import REASON, add_card, export_tiny, run_python

pytest.importorskip("fairseq2", reason=REASON)

SOURCES = [
    "Das Haus ist alt.",
    "Der Fluss fließt durch die Stadt, und die Kinder spielen im Garten.",
    "Ja",
    "Nein",
    "мир",
]
LANGUAGES, EOS = ("de", "en"), 2
COMMAND = ["tools/fairseq2_translate.py", "--source-language", "de", "--target-language", "en"]


def favour_eos(model: MixMoEForCausalLM, directory: Path) -> None:
    """Make EOS one of the likelier tokens, so that translations end before the limit."""
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5
        model.lm_head.weight[0] = 0  # padding, which fairseq2 forbids and Hugging Face does not
    model.save_pretrained(directory)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request: Any, tmp_path_factory: Any, fairseq2_is_set_up: None) -> tuple[Path, Any, Any]:
    """An export, its model in fairseq2, and its tokenizer there."""
    from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig
    from mixmoe_megatron.integrations.fairseq2.extension import get_mixmoe_model_hub
    from mixmoe_megatron.integrations.fairseq2.native_tokenizer import MixMoETokenizerConfig, load_mixmoe_tokenizer

    directory = tmp_path_factory.mktemp("translation")
    hf = export_tiny(directory, request.param, request.param, 2, topk_per_group=2)
    export = directory / request.param
    favour_eos(hf, export)
    config = MixMoEModelConfig.from_hf(hf.config.to_dict())
    model = get_mixmoe_model_hub().load_custom_model(export, config, dtype=torch.float32)
    return export, model.eval(), load_mixmoe_tokenizer(export, MixMoETokenizerConfig())


@pytest.mark.parametrize("max_new_tokens", [3, 24])
def test_greedy_is_hugging_faces(models: tuple[Path, Any, Any], tmp_path: Path, max_new_tokens: int) -> None:
    from mixmoe_megatron.integrations.fairseq2.translation import DecodingOptions, translate_sources

    export, model, tokenizer = models
    options = DecodingOptions(max_new_tokens=max_new_tokens, batch_size=2)
    lines = translate_sources(model, tokenizer, SOURCES, LANGUAGES, options, PromptTemplate())
    prompts = [PromptTemplate().render(source, *LANGUAGES) for source in SOURCES]
    greedy = GenerationOptions("greedy", max_new_tokens=max_new_tokens)
    assert lines == translate(load_model("hf", export), prompts, SOURCES, greedy, tmp_path / "partial.jsonl")
    assert len(set(lines)) > 2


def test_the_trap_of_ragged_batches_is_there(models: tuple[Path, Any, Any]) -> None:
    """What fairseq2 makes of prompts of several lengths is not what it makes of each alone: EOS is forbidden early."""
    from fairseq2.generation.sampling import SamplingSequenceGenerator, TopKSampler
    from fairseq2.nn import BatchLayout
    from torch.nn.utils.rnn import pad_sequence

    _, model, tokenizer = models
    ids = encode_prompts(tokenizer.text_tokenizer, [PromptTemplate().render(s, *LANGUAGES) for s in SOURCES])
    generator = SamplingSequenceGenerator(
        model, tokenizer.vocab_info, TopKSampler(k=1), temperature=1.0, max_gen_len=24
    )

    def generate(rows: list[list[int]]) -> list[list[int]]:
        batch = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        output = generator(batch, BatchLayout.of(batch, list(map(len, rows))))
        return [hypotheses[0].seq.tolist() for hypotheses in output.hypotheses]

    alone = [generate([row])[0] for row in ids]
    assert min(map(len, alone)) < 24
    assert generate(ids) != alone


def test_batches_are_of_equal_length() -> None:
    from mixmoe_megatron.integrations.fairseq2.translation import batches_of_equal_length

    prompts = [[0] * length for length in (3, 1, 3, 2, 3, 3, 1)]
    assert batches_of_equal_length(prompts, 3) == [[1, 6], [3], [0, 2, 4], [5]]
    assert batches_of_equal_length([], 3) == []


def test_beam_search_of_a_batch_is_that_of_each_alone(models: tuple[Path, Any, Any]) -> None:
    from mixmoe_megatron.integrations.fairseq2.translation import DecodingOptions, translate_sources

    _, model, tokenizer = models
    sources = ["Das Haus", "Das Haus", "Ja"]
    together, alone = (
        translate_sources(
            model,
            tokenizer,
            sources,
            LANGUAGES,
            DecodingOptions(3, max_new_tokens=8, batch_size=size),
            PromptTemplate(),
        )
        for size in (16, 1)
    )
    assert together == alone and together[0] == together[1]


def test_the_command(models: tuple[Path, Any, Any], tmp_path: Path) -> None:
    from mixmoe_megatron.integrations.fairseq2.translation import DecodingOptions, translate_sources

    export, model, tokenizer = models
    add_card(export, tmp_path / "cards", "tiny")
    with gzip.open(tmp_path / "in.gz", "wt", encoding="utf-8") as stream:
        stream.write("".join(f"{source}\n" for source in SOURCES))
    words = [*COMMAND, "--input", tmp_path / "in.gz", "--output", tmp_path / "out", "--max-new-tokens", "9"]
    done = run_python([*words, "--model", "tiny", "--cards", tmp_path / "cards"])
    assert done.returncode == 0, done.stderr
    options = DecodingOptions(max_new_tokens=9)
    expected = translate_sources(model, tokenizer, SOURCES, LANGUAGES, options, PromptTemplate())
    assert (tmp_path / "out").read_text("utf-8").splitlines() == expected


REFUSED = {
    "card": (["--model", "nobody"], "error: nobody is not a known model."),
    "cards": (["--cards", "nowhere"], "error: nowhere does not exist."),
    "beams": (["--beams", "0"], "error: --beams must be 1 or more, not 0."),
    "positions": (["--max-new-tokens", "250"], "with --max-new-tokens 250 are more than the model's 256 positions."),
    "language": (["--target-language", "qq"], "qq"),
    "input": (["--input", "nowhere.txt"], "Cannot read nowhere.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    export_tiny(tmp_path, "model")
    (tmp_path / "in.txt").write_text("Ja\n")
    words = [*COMMAND, "--input", tmp_path / "in.txt", "--output", tmp_path / "out", "--model", "mixmoe_model"]
    extra, told = REFUSED[case]
    done = run_python([*words, *extra], tmp_path / "cards")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
