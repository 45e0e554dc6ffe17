"""The committed results of the study: a figure at random is made again, by the jobs that made it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mixmoe_megatron.evaluation.provenance import read_json
from mixmoe_megatron.study.grid import BASE_SYSTEM, Grid, StudySettings, read_grid
from mixmoe_megatron.study.jobs import run_jobs
from mixmoe_megatron.study.statistics import seed_means
from mixmoe_megatron.study.study_results import RETENTION, TRANSLATION, read_scores
from tests.helpers.training import ROOT

STUDY = ROOT / "examples/study"
#: what was run -> what it gave
RESULTS = {
    STUDY / "study.yaml": STUDY / "results/study.json",
    STUDY / "results/second/grid.yaml": STUDY / "results/second/study.json",
}
#: what other processors' rounding may change: points of chrF++, percentage points of bits a byte
TOLERANCE = {TRANSLATION: 1.0, RETENTION: 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("grid_file", RESULTS, ids=lambda file: file.parent.name)
def test_a_figure_at_random_is_found_again(grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    record = json.loads(RESULTS[grid_file].read_text(encoding="utf-8"))
    settings = StudySettings(**{**record["settings"], "pairs": tuple(record["settings"]["pairs"])})
    grid = Grid(read_grid(grid_file), settings)
    system = random.choice([name for name in record["seeds"] if name != BASE_SYSTEM])
    seed = random.randint(1, settings.seeds)
    print(f"{system}, seed {seed}")
    base, job = grid.evaluation(BASE_SYSTEM, 1), grid.evaluation(system, seed)
    run_jobs([base, job], tmp_path)
    untouched = read_json(base.directory(tmp_path) / "evaluation/evaluation.json")
    found = read_scores([job.directory(tmp_path) / "evaluation"], untouched)
    for endpoint, blocks in ((TRANSLATION, found.translation), (RETENTION, found.retention)):
        expected = record["seeds"][system][endpoint][seed - 1]
        assert float(seed_means(blocks)[0]) == pytest.approx(expected, abs=TOLERANCE[endpoint]), (system, seed)
