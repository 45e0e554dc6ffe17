"""The shipped grid as jobs: what tables share, what a change reruns, what is refused; the page of made-up scores."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.study.budgets import matched_starts, matched_steps
from mixmoe_megatron.study.footprint import read_footprint
from mixmoe_megatron.study.grid import TRIAL_FACTORS, TRIAL_SEED, Grid, StudySettings, absent_systems, read_grid
from mixmoe_megatron.study.jobs import Job, with_parents
from mixmoe_megatron.study.study_page import write_study
from mixmoe_megatron.study.trials import chosen_factors, read_trials, trial_sentences, trials_csv
from tests.helpers.browser import BROWSER, Page
from tests.helpers.pretended_study import LENGTH, pretend_evaluation, pretend_table

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
    new = {
        job.name
        for key, job in three.items()
        if key not in seven and not re.search(r" (moe|unfrozen|one_stage)", job.name)
    }
    assert new == {f"{word} stage1, seed {seed}" for word in ("export", "evaluate") for seed in (1, 2)}


def test_the_base_has_one_evaluation_and_each_seed_its_trainings(content: dict[str, Any]) -> None:
    found = sorted(names(jobs_of(content, "VII")))
    assert [name for name in found if name.startswith("evaluate base")] == ["evaluate base"]
    trainings = [name for name in found if name.startswith("train")]
    assert len(trainings) == 2 * 7  # sft; pt_sft, mixmoe and mixmoe_copy twice each
    assert [name for name in found if name.startswith("data")] == ["data de", "data de-en", "data en"]


def test_a_changed_option_reruns_what_depends_on_it(content: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    changed["sizes"]["toy"]["learning_rates"]["mixmoe"]["parallel"] = 1e-3
    before, after = jobs_of(content, "VII", seeds=1), jobs_of(changed, "VII", seeds=1)
    new = {job.name for key, job in after.items() if key not in before}
    assert new == {f"{word}, seed 1" for word in ("train mixmoe on parallel text", "export mixmoe", "evaluate mixmoe")}


def test_what_moe_lpr_reviews_and_what_mixed_text_is(content: dict[str, Any]) -> None:
    grid = Grid(content, SETTINGS)
    monolingual, parallel, review = grid.trainings("moe_lpr", 1)
    assert [training.phase.name for training in (monolingual, parallel, review)] == ["lpr_experts"] * 2 + ["lpr_router"]
    assert review.data == monolingual.data and not review.is_pairs
    original = review.job.words[review.job.words.index("--lpr-original-data-path") + 1]
    assert original == monolingual.data[-1].path("tokens") and monolingual.data[-1].name == "data en"
    assert review.job.parents[0] is parallel.job
    [mixed] = grid.trainings("full_mixed", 1)
    assert mixed.is_pairs and "--split" not in mixed.job.words
    assert [job.name for job in mixed.data] == ["data de beside pairs", "data en beside pairs", "data de-en"]
    assert all("--beside-pairs 257" in " ".join(job.words) for job in mixed.data[:2])


def test_a_measured_start_reads_the_text_that_is_trained_on(content: dict[str, Any]) -> None:
    start = Grid(content, SETTINGS).trainings("mixmoe_measured", 1)[0].start
    files = [f"examples/data/mono.{language}.train.txt.gz" for language in ("de", "en")]
    assert "--measure " + " ".join(files) in " ".join(start.words) and len(start.inputs) == 3


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
    claims = [("mixmoe", "pt_sft"), ("mixmoe", "sft"), ("mixmoe", "base")]
    assert grid.claims_of("VII") == [*claims, ("mixmoe_copy", "pt_sft"), ("mixmoe_copy", "sft")]
    for table in content["tables"]:
        assert grid.evaluations(table)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "huge"}, "There is no size 'huge': choose one of toy, small, real, gpu."),
        ({"seeds": TRIAL_SEED}, "SEEDS must be below 1000, the seed with which learning rates are chosen."),
        ({"seeds": 0}, "MINUTES and SEEDS must be whole numbers from 1."),
        ({"pairs": ("xx-en",)}, "There is no examples/data/xx-en.train.tsv.gz: choose other PAIRS."),
        ({"base": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory: config.json is missing."),
    ],
)
def test_wrong_settings(content: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixMoEError, match=f"^{sentence}$"):
        Grid(content, SETTINGS._replace(**changes))


def test_a_form_of_a_method_has_its_own_start_and_rates(content: dict[str, Any]) -> None:
    monolingual, parallel = Grid(content, SETTINGS).trainings("mixmoe_copy", 1)
    assert monolingual.start.words[4:6] == ("--expert-init", "copy")
    assert [training.phase.name for training in (monolingual, parallel)] == ["stage1", "stage2"]
    rate = content["sizes"]["toy"]["learning_rates"]["mixmoe_copy"]["parallel"]
    assert float(parallel.job.words[parallel.job.words.index("--lr") + 1]) == rate
    assert "mixmoe_copy" not in absent_systems(content)


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
    file.write_text(
        json.dumps({**content, "methods": {"lora": {"start": [], "matched_by": "--rank"}}, "systems": {"a": {}}})
    )
    with pytest.raises(MixMoEError, match="method lora is matched_by --rank: choose one of --lora-rank, --new-blocks"):
        read_grid(file)
    file.write_text(json.dumps({**content, "tables": {"I": {"systems": ["ghost"], "claims": []}}}))
    with pytest.raises(MixMoEError, match="table I has the system ghost"):
        read_grid(file)


def test_the_page_says_what_the_scores_say_and_the_same_each_time(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS._replace(seeds=6)), tmp_path / "jobs"
    pretend_table(grid, "VII", root)
    sentences = write_study(grid, ["VII"], tmp_path, root)
    assert sentences.pop() == f"Page: {tmp_path}/study.html"
    told = {sentence.partition(": ")[2].partition(" (")[0] for sentence in sentences}
    assert "mixmoe better than sft in translation: equal" in told
    assert "mixmoe better than base in translation: holds" not in told  # ten claims of six seeds: Holm forbids it
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(written) == {
        "study.md", "study.html", "study.csv", "study.json", "table_VII.html", "table_VII.tex", "table_VII.png",
        "table_VII_loss.png"
    }  # fmt: skip
    assert "VII,mixmoe,all,retention,10." in written["study.csv"].decode()
    assert "VII,mixmoe,all,load_max mt,2.0" in written["study.csv"].decode()
    assert "VII,mixmoe,all,entropy lm,0.75," in written["study.csv"].decode()  # 1.5 of 2 bits
    page = (tmp_path / "table_VII.html").read_text()
    title = "Table VII: interference (mixmoe_copy: experts that are whole FFNs, not in the paper)"
    assert f"<title>{title}</title>" in page and "31.81" in page and "data:image/png" in page
    assert "31.81" in written["study.md"].decode() and "<b>" not in written["study.html"].decode()
    write_study(grid, ["VII"], tmp_path, root)
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_ten_seeds_of_one_sign_are_a_verdict(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS._replace(seeds=10)), tmp_path / "jobs"
    pretend_table(grid, "VII", root)
    told = {text.partition(": ")[2].partition(" (")[0] for text in write_study(grid, ["VII"], tmp_path, root)}
    assert "mixmoe better than base in translation: holds" in told
    assert "mixmoe better than sft in retention: fails" in told


def test_what_a_system_is_and_costs(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    pretend_table(grid, "VII", root)
    base, full, mixmoe = (read_footprint(grid, name, root) for name in ("base", "pt_sft", "mixmoe"))
    weights = load_file(f"{grid.base}/model.safetensors")
    assert base.total == base.active == full.total == sum(math.prod(tensor.shape) for tensor in weights.values())
    assert base.trained == () and full.trained == (full.total, full.total) and base.training_flops == 0
    width, inner, experts, layers = 192, 576, 4, 2
    group = layers * (3 * width * inner + experts * (2 * width + 1))  # a group's experts are one FFN; router, bias
    assert mixmoe.trained == (group, group)
    assert mixmoe.total == base.total + layers * (2 * experts * (2 * width + 1) + 3 * width * inner)
    idle = 2 * layers * 3 * width * inner * (1 - MixMoEOptions().topk_per_group / experts)
    assert mixmoe.active == mixmoe.total - idle
    size = content["sizes"]["toy"]
    tokens = 12 * size["monolingual"]["batch"] * size["sequence"] + 40 * size["parallel"]["batch"] * LENGTH
    assert 6 * full.total < full.training_flops / tokens < 7 * full.total  # and attention
    assert mixmoe.training_flops < full.training_flops
    assert mixmoe.token_flops < base.token_flops == full.token_flops  # one expert a group: half of an FFN
    assert (full.training_seconds, base.training_seconds, full.generation_seconds) == (3.0, 0.0, 1.5)


def test_budgets_of_equal_operations(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    with pytest.raises(MixMoEError, match="run it once without --dry-run"):
        matched_steps(grid, ["pt_sft"], root)
    pretend_table(grid, "VII", root)
    steps = matched_steps(grid, grid.systems_of("VII"), root)
    before = {kind: content["sizes"]["toy"][kind]["steps_a_minute"] for kind in ("monolingual", "parallel")}
    assert {kind: steps["mixmoe", kind] for kind in before} == before
    assert steps["sft", "parallel"] == steps["pt_sft", "parallel"] < before["parallel"]
    matched = Grid(content, SETTINGS, steps)
    pretend_table(matched, "VII", root)
    spent = {name: read_footprint(matched, name, root).training_flops for name in ("pt_sft", "mixmoe")}
    assert spent["pt_sft"] == pytest.approx(spent["mixmoe"], rel=0.05)
    words = " ".join(matched.trainings("sft", 1)[0].job.words)
    assert f"--train-iters {steps['sft', 'parallel']} " in words
    pretend_table(grid, "II", root)
    steps = matched_steps(grid, ["full_mixed", "moe_lpr"], root)
    assert steps["full_mixed", "mixed"] != content["sizes"]["toy"]["mixed"]["steps_a_minute"]
    assert steps["moe_lpr", "review"] == content["sizes"]["toy"]["review"]["steps_a_minute"]  # nothing to match it to
    matched = Grid(content, SETTINGS, steps)
    pretend_table(matched, "II", root)
    spent = {name: read_footprint(matched, name, root).training_flops for name in ("full_mixed", "mixmoe")}
    assert spent["full_mixed"] == pytest.approx(spent["mixmoe"], rel=0.05)


def test_the_size_for_a_gpu_saves_weights_alone_and_once(content: dict[str, Any]) -> None:
    training = Grid(content, SETTINGS._replace(size="gpu", base="examples/quickstart/base")).trainings("sft", 1)[0]
    assert training.start.words[training.start.words.index("--dtype") + 1] == "bf16"
    words = training.job.words
    last = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    assert int(last["--save-interval"]) > int(last["--train-iters"])  # what is killed begins again
    assert {"--no-save-optim", "--no-load-optim"} <= set(words)


def test_budgets_of_equal_trained_parameters(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    names = grid.systems_of("II")
    with pytest.raises(MixMoEError, match="run it once without --dry-run"):
        matched_starts(grid, names, root)
    pretend_table(grid, "II", root)
    starts = matched_starts(grid, names, root)
    assert set(starts) == {"lora", "llama_pro"}
    matched = Grid(content, SETTINGS, starts=starts)
    pretend_table(matched, "II", root)
    before, after = (read_footprint(of, "lora", root).trained[0] for of in (grid, matched))
    wanted = read_footprint(matched, "mixmoe", root).trained[0]
    assert before < 0.5 * wanted and after == pytest.approx(wanted, rel=0.05)
    assert read_footprint(matched, "full" if "full" in names else "pt_sft", root).trained[0] > wanted


def test_rates_are_chosen_on_valid_files_by_their_own_seed(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    jobs = grid.trials(["VII", "III"])
    assert {factor for method, factor in jobs if method == "full"} == set(TRIAL_FACTORS)
    for (method, factor), job in jobs.items():
        pretend_evaluation(job, root, "sft" if factor == (3.0 if method == "full" else 1.0) else "base")
    ordered = with_parents(jobs.values())
    assert not {job.key for job in ordered if job.name.startswith("train")} & set(jobs_of(content, "VII"))
    assert not [job for job in ordered if "test.tsv.gz" in " ".join(job.words)]
    trials = read_trials(grid, ["VII", "III"], root)
    factors = chosen_factors(trials)
    assert factors["full"] == 3.0 and factors["mixmoe"] == 1.0
    rows = trials_csv(grid, trials).splitlines()
    assert "full,3,0.0015,0.0015,100.0,yes,abc" in rows
    assert [row for row in rows if row.startswith("full,1,0.0005,0.0005,") and row.endswith(",,abc")]
    said = "full: 3 times its learning rates (chrF++ 1.14 at 0.33, 1.14 at 1, 100.00 at 3, an end of the three: "
    assert [sentence for sentence in trial_sentences(trials) if sentence.startswith(said)]
    changed = copy.deepcopy(content)
    changed["sizes"]["toy"]["rate_factors"] = factors
    assert Grid(changed, SETTINGS).rate("full", "parallel") == 0.0015 != grid.rate("full", "parallel")


def test_a_series_is_drawn_over_its_option(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    pretend_table(grid, "3", root)
    write_study(grid, ["3"], tmp_path, root)
    assert "![3: experts in each group](table_3_series.png)" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "table_3_series.png").stat().st_size > 5000


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_on_a_phone(content: dict[str, Any], tmp_path: Path) -> None:
    grid, root = Grid(content, SETTINGS), tmp_path / "jobs"
    pretend_table(grid, "VII", root)
    write_study(grid, ["VII"], tmp_path, root)
    address = (tmp_path / "study.html").as_uri()
    with Page(address, tmp_path / "profile", width=375) as page:
        widths, pictures = page.evaluate(
            "[[innerWidth, document.documentElement.scrollWidth], [...document.images].map(i => i.naturalWidth)]"
        )
        requests, complaints = page.requests, page.complaints
        page.screenshot(tmp_path / "page.png")
    assert [url for url in requests if not url.startswith("data:")] == [address] and complaints == []
    assert widths == [375, 375] and len(pictures) == 2 and min(pictures) > 500
