"""The progress line of long measurements, on a terminal and in a log, with a clock of the test's."""

from __future__ import annotations

import io
import logging

import pytest

from mixmoe_megatron.evaluation.generation import GenerationOptions, translate
from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.evaluation.progress import Progress, time_text
from tests.helpers.tiny_hf import SENTENCES, tiny_dense, tiny_tokenizer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Moves on by so many seconds each time it is read."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_durations() -> None:
    durations = [0.4, 45, 89, 90, 3500, 3600, 12000]
    assert [time_text(value) for value in durations] == [
        "0 s",
        "45 s",
        "89 s",
        "2 min",
        "58 min",
        "1 h 0 min",
        "3 h 20 min",
    ]


def test_a_line_that_moves_on_a_terminal() -> None:
    stream = Terminal()
    with Progress("base de-en", 100, done=20, work=800.0, stream=stream, clock=Clock(10.0)) as progress:
        progress.show(64, "token 2 of at most 256 of a batch")
        progress.advance(40, 400.0, 600)
        progress.show(32, "token 1 of at most 256 of a batch")
    lines = stream.getvalue().split("\r\x1b[K")
    assert lines == [
        "",
        "base de-en: 20 of 100 segments, token 2 of at most 256 of a batch, 6 tokens/s"[:79],
        "base de-en: 60 of 100 segments, 30 tokens/s, 20 s left",
        "base de-en: 60 of 100 segments, token 1 of at most 256 of a batch, 21 tokens/s, 30 s left"[:79],
        "",
    ]


def test_plain_lines_each_half_minute_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), Progress("x", 99, work=99.0, stream=stream, clock=Clock(10.0)) as progress:
        for _ in range(99):
            progress.advance(1, 1.0, 10)
    assert stream.getvalue() == ""
    assert len(caplog.messages) == 33
    assert caplog.messages[0] == "x: 3 of 99 segments, 1 tokens/s, 16 min left"
    assert not any("\r" in line or "\x1b" in line for line in caplog.messages)


def test_quick_work_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stream = Terminal()
    with caplog.at_level(logging.INFO), Progress("x", 9, work=9.0, stream=stream, clock=Clock(0.01)) as progress:
        progress.advance(9, 9.0, 90)
    assert stream.getvalue() == "\r\x1b[K" and caplog.messages == []


def test_the_line_moves_within_a_batch(tmp_path, monkeypatch, caplog) -> None:
    """A batch on a CPU takes minutes: the line tells the token that it is at."""
    model = LoadedModel("a", tiny_dense("llama"), _tokenizer(tmp_path), (2,))
    monkeypatch.setattr("mixmoe_megatron.evaluation.progress._LOG_SECONDS", 0.0)
    options = GenerationOptions("greedy", max_new_tokens=4, batch_size=2)
    texts = list(SENTENCES[1:4])
    with caplog.at_level(logging.INFO):
        assert len(translate(model, texts, texts, options, tmp_path / "partial", "a de-en")) == 3
    lines = [line for line in caplog.messages if line.startswith("a de-en: ")]
    assert "a de-en: 0 of 3 segments, token 1 of at most 4 of a batch" in lines[0]
    assert lines[-1].startswith("a de-en: 3 of 3 segments, ") and lines[-1].endswith(" left")


def _tokenizer(directory):
    from mixmoe_megatron.data.tokenizers import open_tokenizer

    tiny_tokenizer(directory / "tokenizer")
    return open_tokenizer(directory / "tokenizer")
