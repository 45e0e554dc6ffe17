"""COMET by the unbabel-comet package, with a model by name or by path.

Source: Rei et al. 2022 (COMET-22, the default model Unbabel/wmt22-comet-da).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.scores import check_counts

logger = logging.getLogger(__name__)
DEFAULT_COMET = "Unbabel/wmt22-comet-da"
_CHECKPOINT = Path("checkpoints") / "model.ckpt"


def find_comet(model: str) -> Path | None:
    """Find a COMET checkpoint on this machine; nothing is fetched.

    Args:
        model: A checkpoint file, a directory that holds checkpoints/model.ckpt, or a name on the Hugging Face hub whose
            snapshot is in the local cache.

    Returns:
        The checkpoint file, or None.
    """
    path = Path(model)
    if path.is_dir():
        path = path / _CHECKPOINT
    if path.is_file():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(model, local_files_only=True)) / _CHECKPOINT
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return path if path.is_file() else None


def fetch_comet(model: str) -> Path:
    """Return a COMET checkpoint; a name that is not in the cache is fetched from the hub.

    Args:
        model: See `find_comet`.

    Raises:
        MixMoEError: unbabel-comet is not installed, or there is no such model.
    """
    if find_spec("comet") is None:
        raise MixMoEError("COMET needs the package unbabel-comet: pip install 'mixmoe-megatron[comet]'.")
    from comet import download_model

    try:
        path = find_comet(model) or Path(download_model(model))
    except Exception as error:  # the package and the hub raise many kinds
        raise _unusable(model, error) from error
    settings = path.parent.parent / "hparams.yaml"
    if not settings.is_file():
        raise _unusable(model, FileNotFoundError(f"there is no {settings}"))
    return path


def _unusable(model: str, error: Exception) -> MixMoEError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip("'\"").rstrip(".")
    return MixMoEError(
        f"The COMET model {model!r} cannot be used ({reason}): give a checkpoint file, a directory with {_CHECKPOINT}, "
        "or a name on the Hugging Face hub, or leave COMET out (--comet off)."
    )


def choose_comet(wanted: str) -> str | None:
    """Return the COMET model to use.

    Args:
        wanted: "auto": the default model when it is on this machine; "off": none; else the model itself, which is
            fetched now, before hours of decoding.

    Raises:
        MixMoEError: unbabel-comet is not installed, or there is no such model.
    """
    if wanted == "off":
        return None
    if wanted != "auto":
        fetch_comet(wanted)
        return wanted
    if find_spec("comet") is None:
        logger.info("no COMET: unbabel-comet is not installed; pip install 'mixmoe-megatron[comet]' adds it")
        return None
    if find_comet(DEFAULT_COMET) is None:
        logger.info("no COMET: %s is not on this machine; --comet %s fetches it", DEFAULT_COMET, DEFAULT_COMET)
        return None
    return DEFAULT_COMET


def _load(model: str) -> Any:
    """Load from what is on this machine; what is missing, such as the encoder of a model just fetched, comes next."""
    path = str(fetch_comet(model))
    from comet import load_from_checkpoint

    try:
        return load_from_checkpoint(path, local_files_only=True)
    except Exception as missing:  # the package and the hub raise many kinds
        try:
            return load_from_checkpoint(path)
        except Exception:
            raise _unusable(model, missing) from missing


class CometScorer:
    """A loaded COMET model.

    Args:
        model: See `find_comet`; a name that is not in the cache is fetched from the hub.
        device: A torch device; a CUDA device means one GPU.
        batch_size: Segments a step.

    Attributes:
        signature: The model's name or file, and the package's version.

    Raises:
        MixMoEError: unbabel-comet is not installed, or there is no such model.
    """

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 16) -> None:
        self._model = _load(model).eval().half()  # as the comet-score command does: the fourth digit depends on it
        self._gpus = 1 if device.startswith("cuda") else 0
        self._batch_size = batch_size
        self.signature = f"{model}|unbabel-comet:{version('unbabel-comet')}"

    def score(self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Return the system score, the mean over segments.

        Args:
            sources: The source texts.
            hypotheses: Their translations, same length and order.
            references: Their references, same length and order.

        Raises:
            MixMoEError: Counts differ, or there is nothing to score.
        """
        check_counts(hypotheses, references, "The system")
        check_counts(sources, references, "The test set's source side")
        data = [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ]
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        predicted = self._model.predict(
            data, batch_size=self._batch_size, gpus=self._gpus, num_workers=0, progress_bar=False
        )
        return float(predicted.system_score)
