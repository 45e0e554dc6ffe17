"""Saving and loading the Hugging Face Mix-MoE model: whole, sharded, placed by a device map, with and without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from mixmoe_megatron.conversion.exported import code_files, copy_code
from mixmoe_megatron.hf import MixMoEConfig, MixMoEForCausalLM, MixMoEModel
from tests.helpers.tiny_hf import tiny_mixmoe, tiny_tokenizer


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("family", "stage", "tied"), [("llama", 1, True), ("llama", 2, False), ("qwen2", 2, True)])
def test_save_and_load(tmp_path: Path, family: str, stage: int, tied: bool) -> None:
    model = tiny_mixmoe(family, stage, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = MixMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(loaded_state[name], value) for name, value in state.items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded.eval()(token_ids(2, 7)).logits, model(token_ids(2, 7)).logits)


LOAD_WITHOUT_THE_PACKAGE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mixmoe_megatron":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

directory = sys.argv[1]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
ids = torch.load(f"{directory}/ids.pt")
logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)
assert config.stage == 2 and type(base).__name__ == "MixMoEModel"
model.save_pretrained(f"{directory}/again")
torch.save([logits, base(ids).last_hidden_state, generated], f"{directory}/results.pt")
"""


def test_loads_where_the_package_is_absent(tmp_path: Path, repo_root: Path) -> None:
    model, ids = tiny_mixmoe(), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    search_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry != str(repo_root)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    logits, hidden_states, generated = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(logits, model(ids).logits)
    torch.testing.assert_close(hidden_states, model.model(ids).last_hidden_state)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2))
    for directory in (tmp_path, tmp_path / "again"):  # also what the shipped code saves is complete
        auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        for source in code_files():
            assert (directory / source.name).read_text() == source.read_text()


def test_importing_the_package_registers_the_auto_classes(tmp_path: Path) -> None:
    tiny_mixmoe().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MixMoEConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MixMoEModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MixMoEForCausalLM)


def test_the_tokenizer_loads_without_trust(tmp_path: Path) -> None:
    """Who trusts no code gets a plain PretrainedConfig, in which transformers 5.x stumbled over a rope_scaling."""
    tiny_mixmoe().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path, "bpe")
    assert PretrainedConfig.from_pretrained(tmp_path).rope_parameters["factor"] == 8.0
    code = (
        "import sys; from transformers import AutoTokenizer as A; t = A.from_pretrained('.', trust_remote_code=False)"
    )
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + "; print(t('Das Haus').input_ids, 'mixmoe_megatron' in sys.modules)"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == f"{tokenizer('Das Haus').input_ids} False", run.stderr


def test_copy_code(tmp_path: Path) -> None:
    copy_code(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["configuration_mixmoe.py", "modeling_mixmoe.py"]


def test_shards(tmp_path: Path) -> None:
    model, ids = tiny_mixmoe(), token_ids(2, 7)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = MixMoEForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map(tmp_path: Path, place: str) -> None:
    """A layer may lie elsewhere, here on disk: accelerate brings it, experts included, when it is needed."""
    model, ids = tiny_mixmoe(), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys([*parts, *(f"model.layers.{i}" for i in range(4))], "cpu") | {"model.layers.1": place}
    loaded = MixMoEForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
    assert (loaded.model.layers[1].mlp.experts.down_proj.device.type == "meta") == (place == "disk")


def test_other_sizes_are_refused_or_initialised(tmp_path: Path) -> None:
    """A checkpoint of stage 1 in a model of stage 2: an error; on demand, fresh experts of the usual spread."""
    tiny_mixmoe(stage=1).save_pretrained(tmp_path)
    fields = {"stage": 2, "num_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        MixMoEForCausalLM.from_pretrained(tmp_path, **fields)
    model = MixMoEForCausalLM.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)
    block = model.model.layers[1].mlp
    assert 0.01 < block.experts.gate_up_proj.std() < 0.03
    assert 0.01 < block.router.weight.std() < 0.03
    assert block.router.bias.abs().max() == 0


def test_a_new_model_has_the_usual_spread() -> None:
    model = MixMoEForCausalLM(tiny_mixmoe().config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert 0.015 < parameter.std() < 0.025, name


def test_flash_attention_is_passed_on() -> None:
    """Without the package the library says that it is missing, not that the model cannot use it."""
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ImportError, match="FlashAttention2"):
        MixMoEForCausalLM._from_config(tiny_mixmoe().config, attn_implementation="flash_attention_2")
