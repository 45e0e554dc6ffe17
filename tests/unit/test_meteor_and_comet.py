"""METEOR equals NLTK's, COMET equals the package's own, through a real checkpoint that is small and made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation import comet_scores, meteor
from mixmoe_megatron.evaluation.comet_scores import CometScorer, choose_comet, find_comet
from mixmoe_megatron.evaluation.meteor import report_missing_parts, score_meteor
from tests.helpers.tiny_hf import SENTENCES

SOURCES = ["Das Haus ist alt.", "Kinder spielen im Garten.", "Der Fluss fließt durch die Stadt."]
REFERENCES = ["The house is old.", "Children play in the garden.", "The river runs through the town, slowly."]
HYPOTHESES = ["The house is very old.", "Kids played in a garden.", "A river runs through that city"]


def test_meteor_is_the_mean_of_nltks_segment_scores() -> None:
    from nltk.translate.meteor_score import meteor_score

    class Empty:
        def synsets(self, word: str) -> list:
            return []

    words = [
        (["The", "house", "is", "old", "."], ["The", "house", "is", "very", "old", "."]),
        (["Children", "play", "in", "the", "garden", "."], ["Kids", "played", "in", "a", "garden", "."]),
    ]
    expected = [meteor_score([reference], hypothesis, wordnet=Empty()) for reference, hypothesis in words]
    value, signature = score_meteor(HYPOTHESES[:2], REFERENCES[:2], "en")
    assert "|tok:13a|stem:porter|" in signature
    if signature.endswith("wordnet:no"):
        assert value == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert score_meteor(["房子很旧。"], ["房子很旧。"], "zh")[0] > 0.99


def test_meteor_takes_wordnet_when_its_data_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lemma:
        def __init__(self, name: str) -> None:
            self._name = name

        def name(self) -> str:
            return self._name

    class Synset:
        def lemmas(self) -> list[Lemma]:
            return [Lemma("kids"), Lemma("children")]

    class WordNet:
        def synsets(self, word: str) -> list[Synset]:
            return [Synset()] if word in ("kid", "kids") else []  # NLTK looks up stems

    without, _ = score_meteor(HYPOTHESES, REFERENCES, "en")
    monkeypatch.setattr(meteor, "_wordnet", WordNet)
    with_synonyms, signature = score_meteor(HYPOTHESES, REFERENCES, "en")
    assert with_synonyms > without
    assert signature.endswith("wordnet:yes")


def test_what_meteor_lacks_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(meteor, "_wordnet", object)
    report_missing_parts()
    assert not caplog.records
    monkeypatch.setattr(meteor, "_wordnet", lambda: None)
    report_missing_parts()
    assert "METEOR without synonyms: WordNet is not here; python -m nltk.downloader wordnet fetches it" in caplog.text


def test_meteor_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "find_spec", lambda name: None)
    with pytest.raises(MixMoEError, match=r"METEOR needs NLTK: pip install"):
        score_meteor(HYPOTHESES, REFERENCES, "en")
    monkeypatch.undo()
    with pytest.raises(MixMoEError, match="2 hypotheses for 3 references"):
        score_meteor(HYPOTHESES[:2], REFERENCES, "en")


@pytest.fixture(scope="module")
def comet_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COMET checkpoint with a two-layer encoder, laid out as the package's own downloads are."""
    import sentencepiece
    from comet.models import RegressionMetric
    from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

    root = tmp_path_factory.mktemp("comet")
    (root / "text").write_text("\n".join([*SENTENCES, *SOURCES, *REFERENCES]), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"), model_prefix=str(root / "spm"), vocab_size=120, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    encoder = root / "encoder"
    tokenizer = XLMRobertaTokenizerFast(vocab_file=str(root / "spm.model"))
    tokenizer.save_pretrained(encoder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=130, type_vocab_size=1, **ids,
    ).save_pretrained(encoder)  # fmt: skip
    settings: dict[str, Any] = {
        "encoder_model": "XLM-RoBERTa", "pretrained_model": str(encoder), "layer_transformation": "sparsemax",
        "layer_norm": False, "hidden_sizes": [64, 32], "train_data": [], "validation_data": [],
    }  # fmt: skip
    torch.manual_seed(0)
    model = RegressionMetric(**settings, load_pretrained_weights=False, local_files_only=True)
    checkpoint = root / "model" / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    state = {"state_dict": model.state_dict(), "hyper_parameters": settings, "epoch": 0, "global_step": 0}
    torch.save({**state, "pytorch-lightning_version": "2.6.0"}, checkpoint)
    hparams = {**settings, "class_identifier": "regression_metric"}
    (root / "model" / "hparams.yaml").write_text(yaml.safe_dump(hparams), "utf-8")
    return root / "model"


def test_comet_equals_the_package(comet_directory: Path) -> None:
    from comet import load_from_checkpoint

    path = find_comet(str(comet_directory))
    assert path == find_comet(str(path)) == comet_directory / "checkpoints" / "model.ckpt"
    rows = [{"src": a, "mt": b, "ref": c} for a, b, c in zip(SOURCES, HYPOTHESES, REFERENCES, strict=True)]
    theirs = load_from_checkpoint(str(path), local_files_only=True).predict(rows, gpus=0, num_workers=0)
    scorer = CometScorer(str(comet_directory))
    assert scorer.score(SOURCES, HYPOTHESES, REFERENCES) == pytest.approx(theirs.system_score, abs=1e-3)
    assert "unbabel-comet:2." in scorer.signature
    with pytest.raises(MixMoEError, match="2 hypotheses for 3 references"):
        scorer.score(SOURCES, HYPOTHESES[:2], REFERENCES)


@pytest.mark.slow
def test_comet_equals_the_comet_score_command(comet_directory: Path, tmp_path: Path) -> None:
    files = {}
    for name, lines in (("src", SOURCES), ("mt", HYPOTHESES), ("ref", REFERENCES)):
        files[name] = tmp_path / name
        files[name].write_text("".join(f"{line}\n" for line in lines), "utf-8")
    command = [
        str(Path(sys.executable).parent / "comet-score"),
        "-s",
        files["src"],
        "-t",
        files["mt"],
        "-r",
        files["ref"],
    ]
    options = ["--model", comet_directory / "checkpoints" / "model.ckpt", "--gpus", "0", "--num_workers", "0"]
    output = tmp_path / "scores.json"
    subprocess.run([*command, *options, "--to_json", output], check=True, capture_output=True)
    segments = json.loads(output.read_text())[str(files["mt"])]
    mean = sum(segment["COMET"] for segment in segments) / len(segments)
    assert CometScorer(str(comet_directory)).score(SOURCES, HYPOTHESES, REFERENCES) == pytest.approx(mean, abs=1e-6)


def test_which_comet_is_taken(monkeypatch: pytest.MonkeyPatch, comet_directory: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(comet_scores, "find_comet", lambda model: None)
    assert (choose_comet("auto"), choose_comet("off")) == (None, None)
    monkeypatch.setattr(comet_scores, "find_comet", lambda model: comet_directory)
    assert choose_comet("auto") == comet_scores.DEFAULT_COMET
    monkeypatch.undo()
    assert choose_comet(str(comet_directory)) == str(comet_directory)
    (tmp_path / "model.ckpt").touch()
    for model, reason in (("nothing", "not supported by COMET"), ("model.ckpt", r"there is no .*hparams\.yaml")):
        with pytest.raises(MixMoEError, match=f"cannot be used .*{reason}.*or leave COMET out") as before:
            choose_comet(str(tmp_path / model))
        with pytest.raises(MixMoEError, match="cannot be used") as after:
            CometScorer(str(tmp_path / model))
        assert str(before.value) == str(after.value)
