"""Both stages by the recipe: what trains, losses, resume, layouts, and the way on to Megatron.

The base is a tiny Qwen2, upcycled and exported by this package's commands; the text is that of `make_tiny_data`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.conversion import load_weights_of, run_conversion
from tests.helpers.fairseq2_models import REASON, add_card, export_tiny, run_python
from tests.helpers.training import make_tiny_world, train

pytest.importorskip("fairseq2", reason=REASON)

RECIPE = ["-m", "mixmoe_megatron.integrations.fairseq2.recipe"]
#: as many batches as there are: a step is of all the text, and an epoch
WHOLE_EPOCH = {"trainer.grad_accumulation.num_batches": 1000}
DDP = {"trainer.data_parallelism": "ddp"}
Metrics = dict[int, list[dict[str, Any]]]
FSDP = {"trainer.data_parallelism": "fsdp"}


def settings_of(world: Path, stage: int, steps: int, model: str = "mixmoe_upcycled", **changed: Any) -> dict[str, Any]:
    """Return a configuration; `changed` has its keys with dots."""
    pairs = {"paths": [str(world / "pairs.tsv")], "source_language": "de", "target_language": "en"}
    data: dict[str, Any] = {"paths": [str(world / "text.txt")], "min_tokens": 1}
    if stage == 2:
        data = {"pairs": [{**pairs, "both_directions": True}]}
    dataset = {"family": f"mixmoe_{('monolingual', 'parallel')[stage - 1]}", "config_overrides": data}
    settings: dict[str, Any] = {
        "model": {"name": model},
        "tokenizer": {"name": "mixmoe_upcycled"},
        "dataset": {**dataset, "max_seq_len": 200, "max_num_tokens": 400},
        "trainer": {"max_grad_norm": 1.0},
        "optimizer": {"config": {"lr": 0.01, "weight_decay": 0.1}},
        "regime": {"num_steps": steps, "checkpoint_every_n_steps": steps, "publish_metrics_every_n_steps": 1},
        "common": {"no_sweep_dir": True, "assets": {"extra_paths": [str(world / "cards")]}},
    }
    for name, value in changed.items():
        *path, key = name.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return settings


def run_recipe(output: Path, settings: dict[str, Any], processes: int = 1) -> list[dict[str, Any]]:
    """Train and return the metrics of each step."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "in.yaml").write_text(yaml.safe_dump(settings))
    words = [*RECIPE, output, "--no-rich", "--config-file", output / "in.yaml"]
    done = run_python(words, processes=processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (output / "metrics" / "train.jsonl").read_text().splitlines()]


def weights_of(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors, put together by fairseq2."""
    from fairseq2.runtime.dependency import get_dependency_resolver  # noqa: F401

    from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig

    record = yaml.safe_load((output / "checkpoints" / "model.yaml").read_text())
    config = MixMoEModelConfig(**record["model_config"])
    from mixmoe_megatron.integrations.fairseq2.extension import get_mixmoe_model_hub

    path = output / "checkpoints" / f"step_{step}" / "model"
    return get_mixmoe_model_hub().load_custom_model(path, config, dtype=torch.float32).state_dict()


def after_stage_1(world: Path, steps: int = 3, **changed: Any) -> dict[str, Any]:
    """Return the configuration of stage 2 on the stage 1 of `trained`."""
    checkpoints = {"common.assets.prev_checkpoint_dir": str(world / "stage1" / "checkpoints")}
    return settings_of(
        world, 2, steps, "checkpoint_step_4", **{"model.config_overrides.stage": 2}, **checkpoints, **changed
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fairseq2_is_set_up: None) -> Path:
    """base/, upcycled/ (Megatron), hf/ (its export), cards/, text.txt, pairs.tsv and their token files."""
    directory = tmp_path_factory.mktemp("recipe")
    make_tiny_world(directory)
    words = ("--checkpoint-dir", directory / "upcycled", "--output-dir", directory / "hf")
    assert run_conversion("mixmoe_to_hf", *words) == 0
    add_card(directory / "hf", directory / "cards", "mixmoe_upcycled")
    return directory


@pytest.fixture(scope="module")
def trained(world: Path) -> Metrics:
    """The metrics of stage1/ (four steps) and stage2/ (three, each of all pairs), which are exported too."""
    export = {"regime.export_hugging_face": True}
    stage1 = run_recipe(world / "stage1", settings_of(world, 1, 4, **export))
    return {1: stage1, 2: run_recipe(world / "stage2", after_stage_1(world, **WHOLE_EPOCH, **export))}


@pytest.mark.parametrize("stage", [1, 2])
def test_only_the_stages_group_trains(world: Path, trained: Any, stage: int) -> None:
    """All else is bit-identical, weight decay or not."""
    steps = {1: 4, 2: 3}
    after, group = weights_of(world / f"stage{stage}", steps[stage]), ("lm", "mt")[stage - 1]
    if stage == 1:
        before = load_weights_of(world / "hf")
        from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig
        from mixmoe_megatron.integrations.fairseq2.state_dicts import from_any_state_dict

        config = MixMoEModelConfig.from_hf(json.loads((world / "hf" / "config.json").read_text()))
        before = from_any_state_dict(before, config)
    else:
        before = weights_of(world / "stage1", 4)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before.get(name, torch.empty(0)))}
    assert moved == {name for name in after if f".ffn.{group}." in name} and moved


def test_losses_fall_and_are_told_for_each_group(trained: Metrics) -> None:
    for stage, groups in ((1, ["LM"]), (2, ["LM", "MT"])):
        metrics = trained[stage]
        assert metrics[-1]["NLL Loss"] < metrics[0]["NLL Loss"] - 0.01
        assert [name for name in metrics[0] if "Aux" in name] == [f"{group} Aux Loss" for group in groups]
        assert all(0.9 < step[f"{group} Aux Loss"] < 4 for step in metrics for group in groups)


def test_stage_2_begins_where_stage_1_ended(world: Path, trained: Metrics, tmp_path: Path) -> None:
    """Two equal groups, their mean: the first loss is that of the last model of stage 1 on these pairs."""
    from fairseq2.device import CPU
    from fairseq2.gang import create_fake_gangs

    from mixmoe_megatron.data.tokenizers import open_tokenizer
    from mixmoe_megatron.hf import MixMoEForCausalLM
    from mixmoe_megatron.integrations.fairseq2.corpora import (
        PairsConfig,
        ParallelCorpus,
        ParallelCorpusConfig,
        ReadOptions,
    )

    model = MixMoEForCausalLM.from_pretrained(world / "stage1" / "checkpoints" / "step_4" / "hg").eval()
    pairs = PairsConfig(paths=[world / "pairs.tsv"], source_language="de", target_language="en", both_directions=True)
    corpus = ParallelCorpus(ParallelCorpusConfig(pairs=[pairs]))
    options = ReadOptions(max_seq_len=200, max_num_tokens=400, num_accumulate=1000)
    (batches,) = list(corpus.create_reader(open_tokenizer(world / "hf"), create_fake_gangs(CPU), options))
    loss, targets = 0.0, 0
    for batch in batches:
        for ids, mask, length in zip(batch.seqs, batch.target_mask, batch.seq_lens, strict=True):
            labels = ids.where(mask, -100)[None, :length]
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                loss += float(model(ids[None, :length], labels=labels).loss) * count
            targets += count
    assert targets == trained[2][0]["Number of Target Elements"]
    assert trained[2][0]["NLL Loss"] == pytest.approx(loss / targets, abs=1e-5)


def test_a_killed_run_goes_on_to_the_bit(world: Path, trained: Any, tmp_path: Path) -> None:
    every = {"regime.checkpoint_every_n_steps": 2}
    whole = run_recipe(tmp_path / "whole", after_stage_1(world, 4, **every))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_4")
    (tmp_path / "killed" / "metrics" / "train.jsonl").unlink()
    rest = run_recipe(tmp_path / "killed", after_stage_1(world, 4, **every))
    for name in ("NLL Loss", "MT Aux Loss", "Gradient Norm", "Learning Rate"):
        assert [step[name] for step in rest] == [step[name] for step in whole[2:]], name
    expected, found = weights_of(tmp_path / "whole", 4), weights_of(tmp_path / "killed", 4)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_fsdp_equals_ddp_on_two_ranks(world: Path, trained: Any, tmp_path: Path) -> None:
    ddp = run_recipe(tmp_path / "ddp", after_stage_1(world, 3, **DDP), processes=2)
    fsdp = run_recipe(tmp_path / "fsdp", after_stage_1(world, 3, **FSDP), processes=2)
    assert [step["NLL Loss"] for step in fsdp] == [step["NLL Loss"] for step in ddp]
    expected, found = weights_of(tmp_path / "ddp", 3), weights_of(tmp_path / "fsdp", 3)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_two_ranks_equal_one(world: Path, trained: Any, tmp_path: Path) -> None:
    """A step of all pairs, the losses of the ranks weighted by their targets."""
    plain = {"moe_aux_loss_coeff": 0.0, **WHOLE_EPOCH}  # an aux loss is of a rank's own tokens
    one = run_recipe(tmp_path / "one", after_stage_1(world, 1, **plain))
    two = run_recipe(tmp_path / "two", after_stage_1(world, 1, **plain), processes=2)
    for name in ("NLL Loss", "Gradient Norm", "Number of Target Elements"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5), name


def test_tensor_parallelism(world: Path, tmp_path: Path) -> None:
    """The tiny Qwen2 does not tie its embeddings; one that does is refused in one sentence."""
    one = run_recipe(tmp_path / "one", settings_of(world, 1, 3))
    two = run_recipe(tmp_path / "two", settings_of(world, 1, 3, **{"gang.tensor_parallel_size": 2}), processes=2)
    assert [step["NLL Loss"] for step in two] == pytest.approx([step["NLL Loss"] for step in one], abs=2e-5)


def test_activation_checkpointing_and_autocast(world: Path, tmp_path: Path) -> None:
    """The first changes no bit, aux losses included; the second computes in bfloat16 and keeps float32 weights."""
    plain = run_recipe(tmp_path / "plain", settings_of(world, 1, 2))
    mode = {"trainer.activation_checkpointing.mode": "layerwise"}
    again = run_recipe(tmp_path / "again", settings_of(world, 1, 2, **mode))
    for name in ("NLL Loss", "LM Aux Loss", "Gradient Norm"):
        assert [step[name] for step in again] == [step[name] for step in plain], name
    mode = {"trainer.mixed_precision.mode": "auto"}
    mixed = run_recipe(tmp_path / "mixed", settings_of(world, 1, 2, **mode))
    assert mixed[1]["NLL Loss"] != plain[1]["NLL Loss"]
    assert mixed[1]["NLL Loss"] == pytest.approx(plain[1]["NLL Loss"], rel=2e-2)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "mixed", 2).values()} == {torch.float32}


def test_training_goes_on_in_megatron(world: Path, trained: Metrics, tmp_path: Path) -> None:
    """Stage 1 by fairseq2, stage 2 by Megatron: its first loss is that of fairseq2's own stage 2. Stage 2 converts."""
    for stage, step in ((1, 4), (2, 3)):
        export, checkpoint = world / f"stage{stage}" / "checkpoints" / f"step_{step}" / "hg", tmp_path / f"m{stage}"
        assert run_conversion("hf_to_mixmoe", "--hf-dir", export, "--output-dir", checkpoint) == 0
        words = ("--hf-dir", export, "--checkpoint-dir", checkpoint)
        assert run_conversion("check_parity", *words) == 0
    batch = "--micro-batch-size 18 --global-batch-size 18"
    losses, _ = train(2, tmp_path / "m1", world / "pairs", tmp_path / "stage2", 2, batch)
    assert losses[0] == pytest.approx(trained[2][0]["NLL Loss"], abs=2e-5)
    assert losses[1] < losses[0]


TINY_LLAMA = {
    "model.name": None, "model.family": "llama", "model.arch": "llama3_2_1b",
    "model.config_overrides": {"model_dim": 32, "num_layers": 1, "num_attn_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip
REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "static": (1, {"trainer.mixed_precision.mode": "static"}, "trainer.mixed_precision.mode static casts the routers"),
    "bf16": (1, {"model.dtype": "bfloat16"}, "model.dtype must be float32"),
    "data": (2, {}, "A model of stage 1 trains on data of the family mixmoe_monolingual: dataset is of another."),
    "no file": (1, {"dataset.config_overrides.paths": []}, "names no file"),
    "missing": (1, {"dataset.config_overrides.paths": ["nowhere.txt"]}, "Cannot read nowhere.txt"),
    "another model": (1, TINY_LLAMA, "must be of the family mixmoe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(world: Path, tmp_path: Path, case: str) -> None:
    stage, changed, told = REFUSED[case]
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(settings_of(world, stage, 1, **changed)))
    done = run_python([*RECIPE, tmp_path / "out", "--no-rich", "--config-file", tmp_path / "in.yaml"])
    errors = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "ERROR" in line]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0], done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr


def test_tied_embeddings_cannot_be_split(world: Path, tmp_path: Path) -> None:
    export_tiny(tmp_path, "tied", "qwen2", 1, tie_word_embeddings=True)
    settings = settings_of(world, 1, 1, "mixmoe_tied", **{"gang.tensor_parallel_size": 2})
    settings["common"]["assets"]["extra_paths"].append(str(tmp_path / "cards"))
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(settings))
    words = [*RECIPE, tmp_path / "out", "--no-rich", "--config-file", tmp_path / "in.yaml"]
    done = run_python(words, processes=2)
    assert done.returncode and "fairseq2 cannot split tied embeddings" in done.stdout + done.stderr
