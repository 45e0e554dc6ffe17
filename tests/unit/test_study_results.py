"""The study's paper tells what its results hold."""

from __future__ import annotations

import csv
import json
import re

from tests.helpers.training import ROOT

FOLDER = ROOT / "examples/study"


def test_the_papers_table_is_of_the_results() -> None:
    with (FOLDER / "results/study.csv").open(encoding="utf-8") as stream:
        found = {
            (row["table"], row["system"], row["figure"]): [
                float(row[name]) for name in ("value", "low", "high") if row[name]
            ]
            for row in csv.DictReader(stream)
        }
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| (\S+) \[(\S+), (\S+)\] \| (.*?) \|", (FOLDER / "README.md").read_text(), re.M
    )
    assert len(rows) > 10
    for table, system, mean, low, high, change in rows:
        assert [f"{value:.1f}" for value in found[table, system, "translation"]] == [mean, low, high]
        if change.strip():
            value, *ends = found[table, system, "retention"]
            assert change == f"{value:+.1f} % [{', '.join(f'{end:+.1f}' for end in ends)}]"


def test_results_name_no_machine_path_and_tell_their_commits() -> None:
    text = (FOLDER / "results/study.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["commits_of_jobs"] and all(
        re.fullmatch("[0-9a-f]{40}", commit) for commit in record["commits_of_jobs"]
    )
    assert record["settings"]["seeds"] >= 3 and record["settings"]["size"] == "small"
    assert '": "/' not in text
