"""The completed command line: what the checkpoint says comes first, what the user says wins."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, write_metadata
from mixmoe_megatron.conversion.hf_config import hf_config_from_megatron_args, megatron_args_from_hf
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.training.arguments import add_mixmoe_args, apply_options, complete_arguments, has_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODEL = {**megatron_args_from_hf(CONFIG), "make_vocab_size_divisible_by": 16}


def make_checkpoint(directory: Path, stage: str, complete: bool = True, **model: Any) -> Path:
    directory.mkdir()
    options = None if stage == "dense" else MixMoEOptions(moe_every=4, topk_per_group=2).to_dict()
    arguments = {**MODEL, **model}
    write_metadata(directory, Metadata(PHASES[stage], options, arguments, hf_config_from_megatron_args(arguments)))
    if complete:
        (directory / "latest_checkpointed_iteration.txt").write_text("release")
    return directory


def complete(*words: object) -> list[str]:
    return complete_arguments([str(word) for word in words])[0]


def last_value(words: list[str], flag: str) -> str:
    """Return what argparse takes: the value after the flag's last occurrence."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def test_the_architecture_comes_first_and_the_user_wins(tmp_path: Path) -> None:
    parent = make_checkpoint(tmp_path / "up", "upcycled")
    given = ["--mixmoe-stage", "1", "--init-from", parent, "--norm-epsilon", "0.5", "--attention-dropout", "0.1"]
    words = complete(*given)
    assert words[-len(given) :] == [str(word) for word in given], "the user's words are last and as they were"
    assert words.index("--hidden-size") < words.index("--mixmoe-stage")
    assert last_value(words, "--hidden-size") == "32"
    assert last_value(words, "--norm-epsilon") == "0.5" and words.count("--norm-epsilon") == 2
    assert last_value(words, "--attention-dropout") == "0.1"
    assert last_value(words, "--tokenizer-model") == str(parent / "tokenizer")


def test_true_false_and_lists(tmp_path: Path) -> None:
    words = complete("--mixmoe-stage", 1, "--init-from", make_checkpoint(tmp_path / "up", "upcycled"))
    following = words[words.index("--swiglu") + 1]
    assert following.startswith("--"), "True is a bare flag"
    assert "--add-qkv-bias" not in words, "False is left out"
    assert "--add-bias-linear" not in words and "--disable-bias-linear" in words, "unless another flag switches it off"
    assert last_value(words, "--moe-layer-freq") == "[0,0,0,1,0,0,0,1]", "a list is one word"


@pytest.mark.parametrize(
    ("stage", "parent", "experts", "topk"), [(0, "dense", None, None), (1, "upcycled", 4, 2), (2, "stage1", 8, 4)]
)
def test_the_stage_decides_the_experts(
    tmp_path: Path, stage: int, parent: str, experts: int | None, topk: int | None
) -> None:
    words = complete("--mixmoe-stage", stage, "--init-from", make_checkpoint(tmp_path / "parent", parent))
    if experts is None:
        assert "--num-experts" not in words
    else:
        assert (last_value(words, "--num-experts"), last_value(words, "--moe-router-topk")) == (str(experts), str(topk))


@pytest.mark.parametrize(("tensor_parallel", "padded"), [(1, 512), (4, 512), (8, 512), (5, 560)])
def test_the_vocabulary_is_padded_for_tensor_parallelism(tmp_path: Path, tensor_parallel: int, padded: int) -> None:
    parent = make_checkpoint(tmp_path / "up", "upcycled")
    layout = ["--tensor-model-parallel-size", tensor_parallel]
    words = complete("--mixmoe-stage", 1, "--init-from", parent, *layout)
    assert last_value(words, "--padded-vocab-size") == str(padded)


def test_a_run_goes_on_from_load(tmp_path: Path) -> None:
    parent = make_checkpoint(tmp_path / "up", "upcycled", rotary_base=1)
    run = make_checkpoint(tmp_path / "run", "stage1", rotary_base=2)
    both = ["--mixmoe-stage", 1, "--init-from", parent, "--load", run]
    assert has_checkpoint(run)
    words, metadata = complete_arguments([str(word) for word in both])
    assert metadata.phase.name == "stage1" and last_value(words, "--rotary-base") == "2"
    assert last_value(words, "--tokenizer-model") == str(run / "tokenizer")
    assert last_value(complete("--mixmoe-stage", 1, "--load", run), "--rotary-base") == "2"


def test_a_run_without_an_iteration_starts_from_its_parent(tmp_path: Path) -> None:
    parent = make_checkpoint(tmp_path / "up", "upcycled", rotary_base=1)
    run = make_checkpoint(tmp_path / "run", "stage1", complete=False)
    assert not has_checkpoint(run)
    words, metadata = complete_arguments(["--mixmoe-stage", "1", "--init-from", str(parent), "--load", str(run)])
    assert metadata.phase.name == "upcycled" and last_value(words, "--rotary-base") == "1"


@pytest.mark.parametrize(
    ("stage", "found", "what_to_run"),
    [(0, "upcycled", "--dense"), (1, "dense", "upcycle a dense model"), (1, "stage2", "upcycle a dense model"),
     (2, "upcycled", "train stage 1 first"), (2, "stage2", "train stage 1 first")],
)  # fmt: skip
def test_a_parent_of_the_wrong_stage(tmp_path: Path, stage: int, found: str, what_to_run: str) -> None:
    with pytest.raises(MixMoEError, match=f"of stage '{found}'.*{what_to_run}"):
        complete("--mixmoe-stage", stage, "--init-from", make_checkpoint(tmp_path / "x", found))


def test_other_mistakes(tmp_path: Path) -> None:
    run = make_checkpoint(tmp_path / "run", "stage1")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for words, message in (
        (["--mixmoe-stage", 2, "--load", run], f"--load {run} must be a run of --phase stage2"),
        (
            [],
            "give --phase, one of dense, stage1, stage2, ",
        ),
        (
            ["--phase", "upcycled"],
            "--phase must be one of dense, stage1, stage2, .*; got upcycled",
        ),
        (["--phase", "stage1", "--mixmoe-stage", 2], "--mixmoe-stage 2 is the phase stage2, not --phase stage1"),
        (["--mixmoe-stage", 4], "got 4"),
        (["--mixmoe-stage", "x"], "invalid int value: 'x'"),
        (["--mixmoe-stage", 1], "give --init-from DIR"),
        (["--mixmoe-stage", 1, "--load", tmp_path / "new"], "new holds no checkpoint yet"),
        (["--mixmoe-stage", 1, "--init-from", tmp_path / "new"], "no mixmoe_metadata.json"),
        (["--mixmoe-stage", 1, "--init-from", tmp_path / "adapter"], "merge it into its base with peft"),
    ):
        with pytest.raises(MixMoEError, match=message):
            complete(*words)


@pytest.mark.parametrize("theta", [26881.44, 1e22, 0.5])
def test_a_rope_base_that_no_flag_can_say(tmp_path: Path, theta: float) -> None:
    """Megatron's --rotary-base is whole, and Megatron reads its command line more than once."""
    model = megatron_args_from_hf({**CONFIG, "rope_theta": theta})
    parent = make_checkpoint(tmp_path / "up", "upcycled", rotary_base=model["rotary_base"])
    words, metadata = complete_arguments(["--mixmoe-stage", "1", "--init-from", str(parent)])
    assert "--rotary-base" not in words
    args = argparse.Namespace(rotary_base=10000, expert_model_parallel_size=1)  # Megatron's default
    apply_options(args, metadata)
    assert args.rotary_base == theta and isinstance(args.rotary_base, float)
    with pytest.raises(MixMoEError, match=r"--rotary-base is .* in the checkpoint, not 5000: leave the flag out"):
        apply_options(argparse.Namespace(rotary_base=5000, expert_model_parallel_size=1), metadata)


def test_a_refused_word_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_mixmoe_args(argparse.ArgumentParser(allow_abbrev=False))
    for words, message in (
        (["--phase", "upcycled"], "argument --phase: invalid choice: 'upcycled'"),
        (["--mixmoe-stage", "7"], "argument --mixmoe-stage: invalid choice: 7"),
        (["--mixmoe-stage", "1", "--experts-backend", "foo"], "argument --experts-backend: invalid choice: 'foo'"),
        (["--mixmoe-stage", "1", "--nonsense"], "unrecognized arguments: --nonsense"),
    ):
        with pytest.raises(MixMoEError, match=message):
            parser.parse_args(words)
    assert capsys.readouterr() == ("", "")


def test_options_are_put_on_the_arguments(tmp_path: Path) -> None:
    _, metadata = complete_arguments(
        ["--mixmoe-stage", "1", "--init-from", str(make_checkpoint(tmp_path / "up", "upcycled"))]
    )
    args = argparse.Namespace(expert_model_parallel_size=2)
    apply_options(args, metadata)
    assert args.topk_per_group == 2 and args.spectral_transform == "fft"
    with pytest.raises(MixMoEError, match="num_experts_per_group=4 is not divisible by expert_model_parallel_size=3"):
        apply_options(argparse.Namespace(expert_model_parallel_size=3), metadata)


def test_recorded_arguments_must_be_those_of_the_base(tmp_path: Path) -> None:
    parent = make_checkpoint(tmp_path / "up", "upcycled")
    path = parent / METADATA_FILE
    recorded = json.loads(path.read_text())
    for change in ({"num_layers": 12}, {"kv_channels": None}, {"hidden_size": "32"}):
        path.write_text(json.dumps({**recorded, "megatron_args": {**recorded["megatron_args"], **change}}))
        with pytest.raises(MixMoEError, match=f"megatron_args.{next(iter(change))} is"):
            complete("--mixmoe-stage", 1, "--init-from", parent)
