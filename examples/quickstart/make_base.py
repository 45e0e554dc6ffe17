"""Make the untrained base of the quickstart: an own sentencepiece tokenizer and a randomly initialised small Llama.

`train_base.sh` calls this first, then trains the model with the repo's own engine. Text: the training files of
`examples/data` (never valid or test).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

LANGUAGES = ("cs", "de", "ru", "tr", "zh", "fi", "et")
VOCAB_SIZE = 8192


def training_text(data_dir: Path) -> Iterator[str]:
    """Yield every line of the monolingual and parallel training files, English pages once."""
    english: set[str] = set()
    for language in LANGUAGES:
        with gzip.open(data_dir / f"{language}-en.train.tsv.gz", "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield row["xx"]
                if row["en"] not in english:
                    english.add(row["en"])
                    yield row["en"]
    for language in (*LANGUAGES, "en"):
        with gzip.open(data_dir / f"mono.{language}.train.txt.gz", "rt", encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def train_tokenizer(data_dir: Path, output_dir: Path) -> LlamaTokenizerFast:
    """Train a byte-fallback BPE of `VOCAB_SIZE` pieces and save it as a Llama tokenizer with `tokenizer.model`."""
    with tempfile.TemporaryDirectory() as work:
        text, prefix = Path(work) / "text.txt", Path(work) / "tokenizer"
        text.write_text("\n".join(training_text(data_dir)) + "\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(prefix),
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9997,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=16384,
            num_threads=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=1,
        )
        vocabulary = drop_dummy_prefix(prefix.with_suffix(".model"))
        tokenizer = LlamaTokenizerFast(
            vocab_file=str(vocabulary),
            legacy=False,
            add_bos_token=True,
            add_eos_token=False,
            add_prefix_space=False,  # what transformers 5 goes by, in place of tokenizer.json
            pad_token="<pad>",
            model_max_length=512,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.save_pretrained(output_dir)
        (output_dir / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return tokenizer


def drop_dummy_prefix(path: Path) -> Path:
    """Let the sentencepiece model put no space before a text, as the fast tokenizer doesn't: both then agree."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    path.write_bytes(model.SerializeToString())
    return path


def make_model(tokenizer: LlamaTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialised Llama of 5 million parameters, 8 layers, seed 1234."""
    torch.manual_seed(1234)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def main() -> int:
    """Write the tokenizer and the untrained model to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.data_dir, args.output_dir)
    model = make_model(tokenizer)
    model.save_pretrained(args.output_dir)
    print(json.dumps({"vocab_size": len(tokenizer), "parameters": model.num_parameters()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
