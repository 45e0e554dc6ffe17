"""Load any Hugging Face causal language model for evaluation, with the few facts that evaluation needs of it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixmoe_megatron.data.tokenizers import TextTokenizer, check_tokenizer_fits_model, open_tokenizer
from mixmoe_megatron.dtypes import DTYPES, choose_device
from mixmoe_megatron.errors import MixMoEError

_FINGERPRINT_SUFFIXES = {".json", ".safetensors", ".bin", ".py", ".model", ".txt"}
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
_READERS = 4
GROUPED_ATTENTION = "mixmoe_grouped_sdpa"  # among transformers' attention functions


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


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' SDPA without a copy of the keys and values for each head of a query group.

    Beside a mask transformers makes these copies; on a CPU they take 25 times as long as the attention of a new token.

    Args:
        module: The attention layer.
        query: [B, A, S, D]. key, value: [B, K, T, D].
        attention_mask: [B, 1, S, at least T], or None.
        dropout: Probability.
        scaling: Of the logits.
        kwargs: As transformers' own takes them.

    Returns:
        [B, S, A, D], and no attention weights.
    """
    if attention_mask is None or query.shape[1] == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask[..., : key.shape[2]], dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, _grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)


def check_model(name: str, path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> TextTokenizer:
    """Check all of a model that can be checked without its weights, and return its tokenizer.

    The arguments are those of `load_model`.

    Raises:
        MixMoEError: Unknown dtype or device, no model at `path`, damaged weights, or an unusable tokenizer.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise MixMoEError(f"The dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if not (path / "config.json").is_file():
        raise MixMoEError(f"System {name!r}: {path} is not a Hugging Face model directory (it has no config.json).")
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise MixMoEError(f"System {name!r}: {path} holds no weights ({' or '.join(_WEIGHT_PATTERNS)}).")
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise MixMoEError(f"System {name!r}: {file} is damaged ({error}): copy or export it again.") from error
    choose_device(device)
    return open_tokenizer(path)


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
    tokenizer = check_model(name, path, dtype=dtype, device=device)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=True, local_files_only=True
        )
        model = model.to(torch.device(device)).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MixMoEError(f"System {name!r}: the model in {path} cannot be loaded on {device}: {reason}.") from error
    if device == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_ATTENTION)
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [] if configured is None else [configured]
    loaded = LoadedModel(name, model, tokenizer, tuple(sorted({tokenizer.eos_id, *configured})))
    check_tokenizer_fits_model(tokenizer, loaded.vocab_size)
    # A fresh config: sampling settings shipped with a model (temperature, top_p) must not reach greedy or beam search.
    model.generation_config = GenerationConfig(eos_token_id=list(loaded.eos_ids), pad_token_id=tokenizer.pad_id)
    return loaded


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_fingerprint(path: str | Path) -> str:
    """Return a short hash of a model directory's config, tokenizer and weights, independent of where it lies.

    Every byte counts, so that a model in which a single router was trained on is told from the one whose hypotheses are
    on disk; loading reads the same files right after.

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
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.suffix in _FINGERPRINT_SUFFIXES)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_READERS) as pool:
        for file, content in zip(files, pool.map(_sha256_of_file, files), strict=True):
            digest.update(f"{file.name}:{content}\n".encode())
    return digest.hexdigest()[:16]
