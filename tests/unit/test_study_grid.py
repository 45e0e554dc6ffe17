"""The shipped grid as jobs: what tables share, what a change reruns, what is refused; the page of made-up scores."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.grid import EVALUATED, Grid, StudySettings, absent_systems, read_grid
from mixmoe_megatron.study.jobs import Job, with_parents
from mixmoe_megatron.study.study_page import write_study
from tests.helpers.browser import BROWSER, Page

SETTINGS = StudySettings("toy", 1, 2, ("de-en",), "", "examples/data", "float32")
GRID = Path("examples/study/study.yaml")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return read_grid(GRID)


def jobs_of(content: dict[str, Any], table: str, **changes: Any) -> dict[str, Job]:
    grid = Grid(content, SETTINGS._replace(**changes))
    found = with_parents(job for row in grid.evaluations(table).values() for job in row)
    return {job.key: job for job in found}


def names(jobs: dict[str, Job]) -> set[str]:
    return {job.name for job in jobs.values()}


def test_table_iii_needs_of_what_vii_ran_nothing_again(content: dict[str, Any]) -> None:
    seven, three = jobs_of(content, "VII"), jobs_of(content, "III")
    new = {job.name for key, job in three.items() if key not in seven and not re.search(r"\bmoe", job.name)}
    assert new == {f"{word} stage1, seed {seed}" for word in ("export", "evaluate") for seed in (1, 2)}


def test_the_base_has_one_evaluation_and_each_seed_its_trainings(content: dict[str, Any]) -> None:
    found = sorted(names(jobs_of(content, "VII")))
    assert [name for name in found if name.startswith("evaluate base")] == ["evaluate base"]
    trainings = [name for name in found if name.startswith("train")]
    assert len(trainings) == 2 * 5  # sft; pt_sft and mixmoe twice each
    assert [name for name in found if name.startswith("data")] == ["data de", "data de-en", "data en"]


def test_a_changed_option_reruns_what_depends_on_it(content: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    changed["sizes"]["toy"]["learning_rates"]["mixmoe"]["parallel"] = 1e-3
    before, after = jobs_of(content, "VII", seeds=1), jobs_of(changed, "VII", seeds=1)
    new = {job.name for key, job in after.items() if key not in before}
    assert new == {f"{word}, seed 1" for word in ("train mixmoe on parallel text", "export mixmoe", "evaluate mixmoe")}


def test_another_base_of_the_same_path_is_another_job(content: dict[str, Any], tmp_path: Path) -> None:
    keys = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"number": number}))
        keys.append(Grid(content, SETTINGS._replace(base=str(folder))).evaluation("base", 1).inputs[-1])
    assert keys[0] != keys[1]


def test_every_table_can_be_planned_and_an_absent_method_is_left_out(content: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    changed["methods"]["unheard"] = {"start": [], "monolingual": [], "parallel": []}
    changed["systems"]["novel"] = {"method": "unheard", "text": ["parallel"]}
    changed["tables"]["VII"]["systems"].append("novel")
    changed["tables"]["VII"]["claims"].append(["mixmoe", "novel"])
    assert absent_systems(changed) == {**absent_systems(content), "novel": "unheard"}
    grid = Grid(changed, SETTINGS)
    assert "novel" not in grid.systems_of("VII")
    assert grid.claims_of("VII") == [("mixmoe", "pt_sft"), ("mixmoe", "sft"), ("mixmoe", "base")]
    for table in content["tables"]:
        assert grid.evaluations(table)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "huge"}, "There is no size 'huge': choose one of toy, real."),
        ({"seeds": 0}, "MINUTES and SEEDS must be whole numbers from 1."),
        ({"pairs": ("xx-en",)}, "There is no examples/data/xx-en.train.tsv.gz: choose other PAIRS."),
        ({"base": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory: config.json is missing."),
    ],
)
def test_wrong_settings(content: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixMoEError, match=f"^{sentence}$"):
        Grid(content, SETTINGS._replace(**changes))


def test_wrong_grids_and_tables(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match="There is no table 'IX': choose all, or some of II, III"):
        Grid(content, SETTINGS).systems_of("IX")
    file = tmp_path / "grid.yaml"
    with pytest.raises(MixMoEError, match="Cannot read the grid"):
        read_grid(file)
    for text, sentence in (("sizes: [", "Cannot read"), ("sizes: {a: 1}", "has no methods"), ("[]", "has no sizes")):
        file.write_text(text)
        with pytest.raises(MixMoEError, match=sentence):
            read_grid(file)
    changed = {**content, "systems": {**content["systems"], "odd": {"method": "none", "text": []}}}
    file.write_text(json.dumps(changed))
    with pytest.raises(MixMoEError, match="system odd is of the method none, which methods lacks"):
        read_grid(file)
    file.write_text(json.dumps({**content, "tables": {"I": {"systems": ["ghost"], "claims": []}}}))
    with pytest.raises(MixMoEError, match="table I has the system ghost"):
        read_grid(file)


def pretend_evaluations(grid: Grid, table: str, root: Path) -> None:
    """Leave what the jobs of a table would: mixmoe translates as sft does, and forgets 10 %, the others nothing."""
    for system, jobs in grid.evaluations(table).items():
        for job in with_parents(jobs):
            job.directory(root).mkdir(parents=True, exist_ok=True)
            (job.directory(root) / "done.json").write_text('{"seconds": 1.5}')
        for job in jobs:
            folder = job.directory(root) / "evaluation" / "hypotheses"
            folder.mkdir(parents=True, exist_ok=True)
            lines = ["the same words", "other words <b>here</b>"]
            (folder / "de-en.reference.txt").write_text("".join(f"{line}\n" for line in lines))
            said = lines if system != "base" else ["", "none"]
            (folder / f"de-en.{EVALUATED}.txt").write_text("".join(f"{line}\n" for line in said))
            bits = np.array([100.0, 300.0]) * (1.1 if system == "mixmoe" else 1.0)
            routing = {"de": {"layers": {"3": {"lm": {"share": [0.5, 0.25, 0.25, 0.0]}}}}}
            content = {
                "directions": {"de-en": {EVALUATED: {"bleu": 10.0, "chrf": 20.0, "chrf_plus_plus": 30.0}}},
                "perplexity": {"de": {EVALUATED: {"text_bits": bits.tolist()}}},
                "routing": {EVALUATED: routing} if system == "mixmoe" else {},
            }
            (folder.parent / "evaluation.json").write_text(json.dumps(content))


def test_the_page_says_what_the_scores_say_and_the_same_each_time(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS._replace(seeds=6)), tmp_path / "jobs"
    pretend_evaluations(grid, "VII", root)
    sentences = write_study(grid, ["VII"], tmp_path, root)
    told = {sentence.partition(": ")[2].partition(" (")[0] for sentence in sentences}
    assert "mixmoe better than sft in translation: equal" in told
    assert "mixmoe better than base in translation: holds" not in told  # six claims of six seeds: Holm forbids it
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(written) == {
        "study.md", "study.html", "study.csv", "study.json", "table_VII.tex", "table_VII.png"
    }  # fmt: skip
    assert "VII,mixmoe,all,retention,10." in written["study.csv"].decode()
    assert "VII,mixmoe,all,load_max,2.0" in written["study.csv"].decode()
    assert "31.81" in written["study.md"].decode() and "<b>" not in written["study.html"].decode()
    write_study(grid, ["VII"], tmp_path, root)
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_ten_seeds_of_one_sign_are_a_verdict(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS._replace(seeds=10)), tmp_path / "jobs"
    pretend_evaluations(grid, "VII", root)
    told = {text.partition(": ")[2].partition(" (")[0] for text in write_study(grid, ["VII"], tmp_path, root)}
    assert "mixmoe better than base in translation: holds" in told
    assert "mixmoe better than sft in retention: fails" in told


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_on_a_phone(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    pretend_evaluations(grid, "VII", root)
    write_study(grid, ["VII"], tmp_path, root)
    address = (tmp_path / "study.html").as_uri()
    with Page(address, tmp_path / "profile", width=375) as page:
        widths, pictures = page.evaluate(
            "[[innerWidth, document.documentElement.scrollWidth], [...document.images].map(i => i.naturalWidth)]"
        )
        requests, complaints = page.requests, page.complaints
        page.screenshot(tmp_path / "page.png")
    assert [url for url in requests if not url.startswith("data:")] == [address] and complaints == []
    assert widths == [375, 375] and len(pictures) == 1 and pictures[0] > 500
