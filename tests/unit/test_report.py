"""The report says what the evaluation measured: tables, summary.json, pictures, and logs in all three formats."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.comparison import latex_comparison, markdown_comparison, write_comparison
from mixmoe_megatron.study.figures import smooth
from mixmoe_megatron.study.interference import bits_per_byte_change
from mixmoe_megatron.study.report import TOY_NOTE, ReportInputs, build_summary, render_report, write_report
from mixmoe_megatron.study.tables import format_tables, p_value_text, signed, table
from mixmoe_megatron.study.training_log import read_parameters, read_training_log
from tests.helpers.browser import BROWSER, Page

SYSTEMS = ("base", "stage1", "mixmoe")


def routing(share: list[float]) -> dict[str, Any]:
    group = {"share": share, "mean_prob": [0.25] * 4, "load_balance": 1.0, "top_prob": 0.4}
    return {"tokens": 100, "layers": {layer: {"lm": group, "mt": group} for layer in ("3", "7")}}


def comparison(system: str, difference: float, p_value: float) -> dict[str, Any]:
    return {"baseline": "base", "system": system, "bleu_difference": difference, "bleu_p_value": p_value,
            "chrf_difference": difference, "chrf_p_value": p_value, "chrf_interval": 0.7,
            "chrf_baseline_interval": 0.6, "signatures": {}}  # fmt: skip


@pytest.fixture
def evaluation() -> dict[str, Any]:
    directions = ("de-en", "en-de")
    return {
        "baseline": "base",
        "systems": {system: f"models/{system}" for system in SYSTEMS},
        "num_test_segments": dict.fromkeys(directions, 40),
        "directions": {
            name: {system: {"bleu": 1.0 + rank, "chrf": 10.0 + rank, "chrf_plus_plus": 9.0 + rank}
                   for rank, system in enumerate(SYSTEMS)} for name in directions
        },
        "signatures": {name: {"bleu": "tok:13a|x", "chrf": "nc:6|x"} for name in directions},
        "significance": {
            name: {"stage1": comparison("stage1", -0.5, 0.4), "mixmoe": comparison("mixmoe", 2.0, 0.000999)}
            for name in directions
        },
        "perplexity": {
            language: {system: {"perplexity": 10.0 + rank, "bits_per_byte": 1.0 + rank / 10,
                                "text_bits": [10.0 + rank, 20.0 + 2 * rank]}
                       for rank, system in enumerate(SYSTEMS)} for language in ("de", "en")
        },
        "routing": {"mixmoe": {"de": routing([0.7, 0.1, 0.1, 0.1]), "en": routing([0.25] * 4)}},
        "routing_of_directions": {"mixmoe": {name: routing([0.4, 0.2, 0.2, 0.2]) for name in directions}},
        "seconds": {"base": {"translate de-en": 1.0}},
        "options": {"decoding": "greedy", "dtype": "bfloat16", "systems": {"base": "abc"}},
        "versions": {"python": "3.12"},
        "commit": "0123abc",
    }  # fmt: skip


def curves(steps: int = 40) -> dict[str, list[tuple[int, float]]]:
    return {"lm_loss": [(step, 5.0 / step) for step in range(1, steps + 1)],
            "lm_load_balancing_loss": [(step, 1.1) for step in range(1, steps + 1)]}  # fmt: skip


@pytest.fixture
def hypotheses_dir(tmp_path) -> Path:
    folder = tmp_path / "hypotheses"
    folder.mkdir()
    for direction in ("de-en", "en-de"):
        for name in ("source", "reference", *SYSTEMS):
            (folder / f"{direction}.{name}.txt").write_text(f"{name} one | x\n\n", encoding="utf-8")
    return folder


def test_summary_has_the_agreed_form(evaluation) -> None:
    summary = build_summary(ReportInputs(evaluation, {"Stage 1": curves()}, {"stage 1": 12.5}, toy=True))
    assert summary["pair"] == "de-en"
    assert summary["directions"]["de-en"]["mixmoe"]["chrf"] == 12.0
    assert summary["perplexity"] == {name: {"base": 10.0, "stage1": 11.0, "mixmoe": 12.0} for name in ("de", "en")}
    assert summary["significance"]["de-en"]["system"] == "mixmoe"
    assert summary["significance"]["de-en"]["chrf_p_value"] == 0.000999
    assert set(summary["significance"]["de-en"]["systems"]) == {"stage1", "mixmoe"}
    assert summary["seconds"] == {"stage 1": 12.5}
    assert summary["training"]["Stage 1"]["steps"] == 40
    assert {"signatures", "versions", "commit", "routing", "num_test_segments"} <= set(summary)
    json.dumps(summary)


def test_report_text(evaluation, hypotheses_dir) -> None:
    inputs = ReportInputs(
        evaluation, {"Stage 1": curves()}, {"a": 1.0, "b": 2.0}, toy=True, hypotheses_dir=hypotheses_dir
    )
    text = render_report(inputs)
    assert TOY_NOTE in text
    assert "mixmoe is better than base by chrF (+2.00, paired bootstrap p < 0.001)" in text
    assert "stage1 is not distinguishable from base by chrF (-0.50, paired bootstrap p = 0.400)" in text
    assert "`tok:13a|x`" in text
    assert "0123abc" in text
    assert "mixmoe one \\| x" in text
    assert "(empty)" in text
    assert "| total |       3 |" in text
    assert "+20.0 %" in text
    assert "| +20.0 % [+20.0, +20.0] |" in text, "the change of every text is the same, so is every resample's"
    assert "10.0 ± 0.6 -> 12.0 ± 0.7" in text
    assert "by directions" in text
    assert TOY_NOTE not in render_report(ReportInputs(evaluation))


def test_files_and_pictures(evaluation, tmp_path) -> None:
    stages = {"Stage 1": curves(), "Stage 2": {**curves(), "mt_load_balancing_loss": [(1, 1.2), (2, 1.1)]}}
    summary = write_report(ReportInputs(evaluation, stages), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"scores.png", "loss_curves.png", "routing_mixmoe.png", "routing_of_directions_mixmoe.png"}
    assert names == {"report.md", "report.html", "summary.json", *pictures}
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8")) == summary
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in names if name.endswith(".png"))
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in names if name.endswith(".png"))


def test_retention_while_training(evaluation, tmp_path) -> None:
    bits = {"bits_per_byte_de": [(0, 2.5), (20, 1.9), (40, 1.5)], "bits_per_byte_en": [(20, 1.2), (40, 1.1)]}
    stages = {"Stage 1": {**curves(), **bits, "tokens_seen": [(0, 0.0), (20, 1e6), (40, 2e6)]}, "Stage 2": curves(),
              "Stage 3": {**curves(), "bits_per_byte_zh": [(0, 3.0)]}}  # fmt: skip
    summary = write_report(ReportInputs(evaluation, stages, dense_bits={"de": 1.9, "en": 1.0}), tmp_path)
    assert (tmp_path / "retention.png").stat().st_size > 5000
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [re.sub(" +", " ", line) for line in text.splitlines() if line.startswith("| Stage")]
    assert "| Stage 1 | de | 40 | 2.00 | 2.500 | 1.500 | 1.900 | at step 20 |" in rows
    assert "| Stage 1 | en | 40 | 2.00 | - | 1.100 | 1.000 | not yet |" in rows
    assert "| Stage 3 | zh | 0 | - | 3.000 | 3.000 | - | - |" in rows
    assert [entry["paid_back_at"] for entry in summary["retention"]] == [20, None, None]
    assert not build_summary(ReportInputs(evaluation, {"Stage 1": curves()}))["retention"]


def test_a_report_of_perplexity_alone(evaluation, tmp_path) -> None:
    evaluation.update(directions={}, significance={}, signatures={}, num_test_segments={}, routing={}, baseline=None,
                      routing_of_directions={})  # fmt: skip
    write_report(ReportInputs(evaluation), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("**mixmoe was evaluated without the untouched base")
    assert "\n# Mix-MoE report: de, en\n" in text
    assert "## Translation" not in text


def test_mistakes(evaluation, tmp_path) -> None:
    with pytest.raises(MixMoEError, match="baseline is missing"):
        ReportInputs({})
    with pytest.raises(MixMoEError, match=r"no .*de-en\.source\.txt"):
        render_report(ReportInputs(evaluation, hypotheses_dir=tmp_path))


def test_tables() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a   |   b |\n| --- | --: |\n| x   |   1 |"
    assert [p_value_text(value) for value in (0.0004, 0.001, 0.0512)] == ["p < 0.001", "p = 0.001", "p = 0.051"]


def test_nothing_has_no_sign_and_one_text_no_interval(evaluation) -> None:
    assert [signed(value) for value in (0.04, -0.04, -0.0, 0.06)] == ["0.0", "0.0", "0.0", "+0.1"]
    for systems in evaluation["perplexity"].values():
        for value in systems.values():
            value["text_bits"] = value["text_bits"][:1]
    for tests in evaluation["significance"].values():
        for test in tests.values():
            test.update(chrf_interval=0.0, chrf_baseline_interval=0.0)
    text = render_report(ReportInputs(evaluation))
    assert " +20.0 % |" in text and "+20.0 % [" not in text
    assert "10.0 -> 12.0" in text and "±" not in text
    assert bits_per_byte_change({"text_bits": [1.0]}, {"text_bits": [1.0]}) == (0.0, None, None)
    alike = {"text_bits": [1.0, 2.0]}
    assert bits_per_byte_change(alike, alike) == (0.0, 0.0, 0.0)


def test_screen_tables(evaluation) -> None:
    text = format_tables(evaluation)
    assert "de-en: 40 segments" in text
    assert "+2.00 (p < 0.001)" in text
    assert "Routing of mixmoe" in text


def test_smoothing_keeps_level_and_length() -> None:
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([3.0]) == [3.0]
    line = [float(value) for value in range(100)]
    assert smooth(line)[10:90] == pytest.approx(line[10:90])


def test_jsonl_log_with_a_resumed_run(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    records = [{"iteration": 1, "lm_loss": 3.0, "note": "x"}, {"iteration": 2, "lm_loss": 9.0, "grad_norm": 1},
               {"iteration": 2, "lm_loss": 2.0}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    assert read_training_log(path) == {"lm_loss": [(1, 3.0), (2, 2.0)], "grad_norm": [(2, 1.0)]}
    path.write_text('{"iteration": 1, "lm_loss": 3.0}\n{"lm_loss": 2}\n', encoding="utf-8")
    with pytest.raises(MixMoEError, match="line 2: not a JSON object with an 'iteration'"):
        read_training_log(path)


def test_megatron_log(tmp_path) -> None:
    path = tmp_path / "train.log"
    path.write_text(
        "loading\n [2026-01-01 10:00:00] iteration        5/     100 | consumed samples:         40 | elapsed time per"
        " iteration (ms): 123.4 | learning rate: 1.000000E-05 | lm loss: 1.033E+01 | lm load balancing loss: 1.02E+00 |"
        " loss scale: 1.0 | grad norm: 0.913 |\n",
        encoding="utf-8",
    )
    log = read_training_log(path)
    assert log["lm_loss"] == [(5, 10.33)]
    assert log["lm_load_balancing_loss"] == [(5, 1.02)]
    assert log["grad_norm"] == [(5, 0.913)]


def test_tensorboard_log(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            writer.add_scalar("lm loss", 4.0 / step, step)
            writer.add_scalar("grad-norm", 0.5, step)
    assert read_training_log(tmp_path) == {"lm_loss": [(1, 4.0), (2, 2.0)], "grad_norm": [(1, 0.5), (2, 0.5)]}


def test_logs_that_hold_nothing(tmp_path) -> None:
    with pytest.raises(MixMoEError, match="no training log"):
        read_training_log(tmp_path / "absent.jsonl")
    (tmp_path / "empty.log").write_text("nothing\n", encoding="utf-8")
    with pytest.raises(MixMoEError, match="no training step"):
        read_training_log(tmp_path / "empty.log")


def test_the_command(evaluation, tmp_path, repo_root, monkeypatch, capsys) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "lm_loss": 3.0}\n', encoding="utf-8")
    (tmp_path / "seconds.json").write_text('{"stage 1": 5}', encoding="utf-8")
    spec = importlib.util.spec_from_file_location("write_report", repo_root / "tools" / "write_report.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    options = ["--evaluation", "evaluation.json", "--stage1-log", "log.jsonl", "--seconds", "seconds.json", "--toy",
               "--output-dir", "out", "--dense-bits", "de=1.5"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["write_report.py", *options])
    assert tool.main() == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["seconds"] == {"stage 1": 5}
    monkeypatch.setattr(sys, "argv", ["write_report.py", *options, "--dense-bits", "en=few"])
    assert tool.main() == 2
    assert "--dense-bits takes NAME=NUMBER (could not convert" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["write_report.py", "--evaluation", "absent.json", "--output-dir", "out"])
    assert tool.main() == 2
    assert capsys.readouterr().err == "error: There is no file absent.json.\n"


def test_the_page_needs_no_other_file(evaluation, tmp_path) -> None:
    evaluation["systems"] = {name: "<script>" for name in SYSTEMS}
    write_report(ReportInputs(evaluation, {"Stage 1": curves()}), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'name="viewport"' in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count('<div class="table"><table>') == page.count("</table></div>") > 4
    assert "<script" not in page


LOOK = """(() => {
  const root = document.documentElement, style = getComputedStyle, all = query => [...document.querySelectorAll(query)];
  const size = part => part.getBoundingClientRect(), head = style(document.querySelector('th'));
  return {
    widths: [innerWidth, root.scrollWidth],
    pictures: [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.clientHeight]),
    boxes: all('table, img.wide').map(part => [style(part.parentElement).overflowX, size(part.parentElement).right]),
    letters: Math.min(...all('th, td, p').map(part => parseFloat(style(part).fontSize))),
    lines_of_a_figure: Math.max(...all('td[style*=right]').map(part => size(part).height / 24)),
    widest_example: Math.max(...all('td:nth-child(2):last-child').map(part => size(part).right)),
    colours: [style(document.body).color, head.color, head.backgroundColor].map(text => text.match(/\\d+/g)),
  };
})()"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_the_page(evaluation, hypotheses_dir, tmp_path, dark) -> None:
    """The browser's own layout at 375 pixels: only tables and wide pictures scroll, and all can be read."""
    long = f"A sentence that fills more than a line of a phone, and https://example.org/{'longer/' * 20}\n\n"
    (hypotheses_dir / "de-en.mixmoe.txt").write_text(long, encoding="utf-8")
    inputs = ReportInputs(evaluation, {"Stage 1: monolingual text": curves()}, hypotheses_dir=hypotheses_dir, toy=True)
    write_report(inputs, tmp_path / "report")
    address = (tmp_path / "report" / "report.html").as_uri()
    with Page(address, tmp_path / "profile", width=375, dark=dark) as page:
        look = page.evaluate(LOOK)
        page.screenshot(tmp_path / "page.png")
        requests, complaints = page.requests, page.complaints
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert complaints == []
    assert look["widths"] == [375, 375]
    assert [width for width, _, _ in look["pictures"] if width > 0] == [width for width, _, _ in look["pictures"]]
    assert len(look["pictures"]) == 4 and all(min(width, height) > 100 for _, width, height in look["pictures"])
    assert all(overflow == "auto" and right <= 375 for overflow, right in look["boxes"])
    assert look["letters"] >= 14
    assert look["lines_of_a_figure"] < 2
    assert look["widest_example"] <= 375
    paper = (imread(tmp_path / "page.png")[0, 0, :3] * 255).tolist()
    text, head, head_paper = ([float(number) for number in colour] for colour in look["colours"])
    assert (sum(paper) < 150) == dark
    assert min(contrast(text, paper), contrast(head, head_paper)) > 7, "WCAG's AAA"


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2's contrast of two sRGB colours, 1 to 21."""

    def luminance(colour: list[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in colour[:3])]
        return sum(share * x for share, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_the_papers_table(evaluation, tmp_path) -> None:
    for systems in evaluation["directions"].values():
        for rank, scores in enumerate(systems.values()):
            scores.update(meteor=0.2 + rank / 100, comet=0.5 - rank / 100)
    text = markdown_comparison(evaluation)
    assert "B BLEU, M METEOR, C COMET" in text
    assert "| mixmoe | **3.0** | **22.0** |     48.0 |" in text
    assert "| base   |     1.0 |     20.0 | **50.0** |" in text
    assert text.index("DE-EN B") < text.index("EN-DE B")
    latex = latex_comparison(evaluation)
    assert r"\multicolumn{3}{c}{DE-EN}" in latex
    assert r"mixmoe & \textbf{3.0} & \textbf{22.0} & 48.0 \\" in latex
    write_comparison(evaluation, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"comparison.{suffix}" for suffix in ("md", "tex", "csv", "json")
    }
    lines = (tmp_path / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "system,direction,metric,score"
    assert "base,de-en,meteor,0.2" in lines
    for systems in evaluation["directions"].values():
        for scores in systems.values():
            del scores["meteor"], scores["comet"]
    assert "B BLEU, F chrF, F+ chrF++" in markdown_comparison(evaluation)


def test_intervals_are_those_of_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(0)
    before = generator.gamma(2.0, 50.0, size=400)
    after = before * generator.normal(1.05, 0.1, size=400)
    change, low, high = bits_per_byte_change({"text_bits": before.tolist()}, {"text_bits": after.tolist()})
    assert low < 5.0 < high
    assert low < change < high
    assert high - low < 4.0, "pairing removes what makes a text easy for both"
    shuffled = bits_per_byte_change({"text_bits": before.tolist()}, {"text_bits": sorted(after.tolist())})
    assert shuffled[2] - shuffled[1] > 2 * (high - low)


def test_how_many_parameters_a_log_says_are_trained(tmp_path: Path) -> None:
    log = tmp_path / "stage1.log"
    log.write_text("trained 7 of 99 parameters (7.1 %)\nthe run goes on\ntrained 1,207 of 20,000 parameters (6.0 %)\n")
    assert read_parameters(log) == ("1,207", "20,000")  # of the last start
    log.write_text("killed before it said it\n")
    with pytest.raises(MixMoEError, match="does not say how many parameters are trained"):
        read_parameters(log)
