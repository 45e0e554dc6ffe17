"""Load any Hugging Face causal language model for evaluation, with the few facts that evaluation needs of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from mixmoe_megatron.data.tokenizers import TextTokenizer, check_tokenizer_fits_model, open_tokenizer
from mixmoe_megatron.errors import MixMoEError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FINGERPRINT_SUFFIXES = {".json", ".safetensors", ".bin", ".py", ".model", ".txt"}
_SAMPLE_BYTES = 1 << 20
_SAMPLES_PER_FILE = 64


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode and its tokenizer; build it with `load_model`.

    Attributes:
        name: How the user calls the system (``base``, ``mixmoe`` ...).
        model: A transformers model with a language-modelling head.
        tokenizer: Its checked tokenizer.
        eos_ids: Every token id that ends a generation, sorted.
    """

    name: str
    model: Any
    tokenizer: TextTokenizer
    eos_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the inputs must be."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens, that the config names; None where it names none."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def has_rotary_positions(self) -> bool:
        """Whether a sequence beyond `max_positions` can be computed at all, if not well."""
        return any(hasattr(self.model.config, key) for key in ("rope_theta", "rope_parameters"))

    @property
    def start_id(self) -> int:
        """The context of a text's first token: BOS where the tokenizer adds one, else EOS, as in packed training."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id


def load_model(name: str, path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a model directory and its tokenizer; model code shipped in the directory is run.

    Args:
        name: Name of the system in messages and results.
        path: The directory.
        dtype: float32, bfloat16 or float16.
        device: A torch device such as ``cpu`` or ``cuda:0``.

    Raises:
        MixMoEError: Unknown dtype or device, no model at `path`, or a tokenizer that does not fit or has no EOS.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise MixMoEError(f"The dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    if not (path / "config.json").is_file():
        raise MixMoEError(f"System {name!r}: {path} is not a Hugging Face model directory (it has no config.json).")
    tokenizer = open_tokenizer(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=_DTYPES[dtype], trust_remote_code=True, local_files_only=True
        )
        model = model.to(torch.device(device)).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MixMoEError(f"System {name!r}: the model in {path} cannot be loaded on {device}: {reason}.") from error
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [] if configured is None else [configured]
    loaded = LoadedModel(name, model, tokenizer, tuple(sorted({tokenizer.eos_id, *configured})))
    check_tokenizer_fits_model(tokenizer, loaded.vocab_size)
    # A fresh config: sampling settings shipped with a model (temperature, top_p) must not reach greedy or beam search.
    model.generation_config = GenerationConfig(eos_token_id=list(loaded.eos_ids), pad_token_id=tokenizer.pad_id)
    return loaded


def _update_with_samples(digest: Any, path: Path) -> None:
    """Hash a file's name, size and up to 64 evenly spread MiB of it, the first and the last among them."""
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}\n".encode())
    count = min(_SAMPLES_PER_FILE, max(1, -(-size // _SAMPLE_BYTES)))
    last = max(0, size - _SAMPLE_BYTES)
    with path.open("rb") as stream:
        for index in range(count):
            stream.seek(last * index // max(1, count - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def fingerprint(path: str | Path) -> str:
    """Return a short hash of a model directory's config, tokenizer and weights, independent of where it lies.

    Weight files above 64 MiB are sampled, not read whole. The hash tells a re-trained model from the one whose
    hypotheses are on disk; it is no proof of integrity.

    Args:
        path: The directory.

    Returns:
        16 hexadecimal digits.

    Raises:
        MixMoEError: There is no such directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise MixMoEError(f"There is no model directory {directory}.")
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in _FINGERPRINT_SUFFIXES:
            _update_with_samples(digest, file)
    return digest.hexdigest()[:16]
