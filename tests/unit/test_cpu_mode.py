"""CPU mode: nothing with CUDA, the supported Megatron only, once, and factories that take device="cuda".

Each test runs a program of its own: what CPU mode replaces must not reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from tests.helpers.training import ROOT

SNAPSHOT = """
import torch
from mixmoe_megatron.megatron_patches import cpu_mode
from mixmoe_megatron.errors import MixMoEError

def snapshot():
    places = [torch, torch.cuda, torch.cuda.nvtx, torch.Tensor, torch.nn.Module]
    return [dict(vars(place)) for place in places]
"""


def run_program(text: str) -> None:
    """Run a program after `SNAPSHOT`; fail the test, with its output, when the program fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    program = SNAPSHOT + textwrap.dedent(text)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_inert_with_cuda_and_a_sentence_for_another_megatron() -> None:
    run_program("""
        import megatron.core
        before = snapshot()
        available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        assert cpu_mode.enable_cpu_mode() is False
        torch.cuda.is_available = available
        assert snapshot() == before and not cpu_mode.is_cpu_mode(), "CUDA is there: nothing is touched"

        supported, megatron.core.__version__ = megatron.core.__version__, "0.20.1"
        try:
            cpu_mode.enable_cpu_mode()
            raise SystemExit("0.20.1 was accepted")
        except MixMoEError as error:
            assert str(error).startswith("Mix-MoE supports megatron-core 0.19.x, found 0.20.1: install"), error
        assert snapshot() == before and not cpu_mode.is_cpu_mode(), "another Megatron: nothing is touched"
    """)


def test_enabled_once_and_on_the_cpu() -> None:
    run_program("""
        plain_randn = torch.randn
        assert cpu_mode.enable_cpu_mode() is True and cpu_mode.is_cpu_mode()
        first = snapshot()
        assert cpu_mode.enable_cpu_mode() is True
        assert snapshot() == first, "a second call changes nothing"
        assert torch.randn.__wrapped__ is plain_randn

        for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), "cpu", None):
            for tensor in (torch.zeros(2, device=device), torch.empty((2, 3), device=device),
                           torch.tensor([1.5], device=device), torch.full((2,), 7, device=device),
                           torch.arange(3, device=device), torch.randint(0, 5, (2,), device=device)):
                assert tensor.device.type == "cpu"
        assert torch.zeros(1, device="meta").device.type == "meta", "other devices are left alone"
        assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor", "Megatron's optimizers ask for this name"
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            start.record()
        end.record()
        assert start.elapsed_time(end) >= 0 and end.query()
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        one = torch.rand(2)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(2), one)
    """)


def test_a_device_as_a_context_still_acts() -> None:
    """Transformers builds a model it loads under `torch.device("meta")` and fills in afterwards what stayed there."""
    run_program("""
        assert cpu_mode.enable_cpu_mode() is True
        with torch.device("meta"):
            made = [torch.empty(2), torch.arange(2), torch.nn.Linear(2, 2).weight, torch.empty(2, device="cpu")]
        assert [tensor.device.type for tensor in made] == ["meta", "meta", "meta", "cpu"], made
    """)


def test_torch_compile_works_beside_it() -> None:
    run_program("""
        cpu_mode.enable_cpu_mode()
        double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
        assert double(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    """)


def test_cuda_stays_away_where_lightning_lets_torch_ask_nvml() -> None:
    """torch.cuda.is_available() is then `device_count() > 0`, and CPU mode has a device for each process."""
    run_program(
        """
        import os
        from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode

        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        assert enable_cpu_mode() and torch.cuda.device_count() == 1
        assert not torch.cuda.is_available()
        """
    )


def test_freed_memory_serves_the_next_tensor() -> None:
    """Without a page fault for each 4 KiB of it."""
    run_program("""
        import resource
        cpu_mode.enable_cpu_mode()
        faults = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MiB, 16384 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert min(faults) < 100, faults
    """)


def test_training_gives_pages_back_that_hold_nothing() -> None:
    """Tensors that go leave holes between those that stay; each eighth step, or one short of memory, returns them."""
    run_program("""
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        cpu_mode.enable_cpu_mode()
        cpu_mode._memory_is_short = lambda: False
        pairs = [(torch.ones(2**20), torch.ones(2**20)) for _ in range(64)]  # 4 MiB each
        kept = [pair[0] for pair in pairs]
        del pairs
        before = resident()
        for _ in range(7):
            assert cpu_mode._train_step(lambda value: value, 7) == 7
        assert resident() > before - 50, "page faults are spared"
        cpu_mode._train_step(lambda value: value, 7)
        assert resident() < before - 200 and all(tensor.sum() == 2**20 for tensor in kept)
        del kept[::2]
        full = resident()
        cpu_mode._memory_is_short = lambda: True
        cpu_mode._train_step(lambda value: value, 7)
        assert resident() < full - 100
    """)


def test_memory_is_short_below_a_third() -> None:
    run_program("""
        class Told(cpu_mode.Path):
            def read_text(self, encoding):
                return f"MemTotal:  24 kB\\nMemFree:  1 kB\\nMemAvailable:  {available} kB\\nHugePages_Total:  0\\n"
        assert cpu_mode._memory_is_short() in (True, False), "the machine's own file can be read"
        cpu_mode.Path = Told
        for available, is_short in ((7, True), (8, False)):
            assert cpu_mode._memory_is_short() is is_short
    """)
