"""`make methods` on the toy base: every method starts, trains, is exported and generates without this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.examples import assert_refused, run_example

KEEP_THE_BASE = ("lora", "llama_pro", "moe", "moe_all")  # methods whose start says what the base says
EXPORTS = {
    "full": "LlamaForCausalLM", "mixmoe": "MixMoEForCausalLM", "lora": "LlamaForCausalLM",
    "llama_pro": "LlamaForCausalLM", "moe": "Qwen2MoeForCausalLM", "moe_all": "Qwen2MoeForCausalLM",
    "moe_lpr": "Qwen2MoeForCausalLM", "llama_moe_v2": "Qwen2MoeForCausalLM",
    "llama_moe_v2_residual": "Qwen2MoeForCausalLM",
}  # fmt: skip


@pytest.mark.slow
def test_every_method_goes_the_whole_way(tmp_path: Path) -> None:
    status, output = run_example("methods", tmp_path, STEPS="2", BASE="examples/quickstart/base", DTYPE="float32")
    assert status == 0, output[-3000:]
    cells = [line.split("|")[1:-1] for line in (tmp_path / "out" / "methods.md").read_text().splitlines()[2:]]
    rows = {(method.strip(), phase.strip()): [cell.strip() for cell in rest] for method, phase, *rest in cells}
    assert len(rows) == len(EXPORTS) + 2, "Mix-MoE and MoE-LPR have two phases"
    loss_of_base = rows["full", "dense"][0]
    for method in KEEP_THE_BASE:
        phase = next(phase for name, phase in rows if name == method)
        assert rows[method, phase][0] == loss_of_base, method
    assert {method: row[-1] for (method, _), row in rows.items()} == EXPORTS


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"METHODS": "lora sfx"}, "METHODS: sfx is not one of: full mixmoe"),
        ({"STEPS": "few"}, "STEPS=few must be a whole number from 1."),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], sentence: str, tmp_path: Path) -> None:
    assert_refused("methods", tmp_path, sentence, **settings)
