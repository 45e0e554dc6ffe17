"""`mixmoe COMMAND ...`, or `python -m mixmoe_megatron COMMAND ...`: the commands of tools/ and checkpoints_conversion/.

A command is a thin file, which a clone has beside the package and a wheel inside it (`package-dir` in pyproject.toml).
It is run from there, by its path: so there is one text of each command, with the same words however it is called, and
no module of the package depends on those folders.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from mixmoe_megatron.cli import run_command
from mixmoe_megatron.errors import MixMoEError

COMMANDS = {
    "hf-to-megatron": "checkpoints_conversion/hf_to_mixmoe.py",
    "to-hf": "checkpoints_conversion/mixmoe_to_hf.py",
    "add-mt-experts": "checkpoints_conversion/add_mt_experts.py",
    "parity": "checkpoints_conversion/check_parity.py",
    "prepare": "tools/prepare_data.py",
    "preprocess": "tools/preprocess_data.py",
    "train": "tools/pretrain_mixmoe.py",
    "evaluate": "tools/evaluate_translation.py",
    "report": "tools/write_report.py",
    "study": "tools/study.py",
    "transfer-matrix": "tools/transfer_matrix.py",
    "routing": "tools/inspect_routing.py",
    "plan": "tools/plan_cluster.py",
    "check-checkpoint": "tools/check_checkpoint.py",
    "check-tokenizer": "tools/check_tokenizer.py",
    "fairseq2-card": "tools/fairseq2_card.py",
    "fairseq2-translate": "tools/fairseq2_translate.py",
    "benchmark-conversion": "tools/benchmark_conversion.py",
    "benchmark-generation": "tools/benchmark_generation.py",
    "benchmark-layer": "tools/benchmark_layer.py",
    "benchmark-startup": "tools/benchmark_startup.py",
    "benchmark-step": "tools/benchmark_step.py",
}


def command_path(name: str) -> Path:
    """Return the file of a command.

    Args:
        name: of COMMANDS.
    """
    package = Path(__file__).resolve().parent
    return (package if (package / "tools").is_dir() else package.parent) / COMMANDS[name]


def describe_commands() -> str:
    """Return what `mixmoe --help` shows: each command with the first line of its file."""
    lines = ["usage: mixmoe COMMAND ...", "", "`mixmoe COMMAND --help` lists the options of a command.", ""]
    for name in COMMANDS:
        about = ast.get_docstring(ast.parse(command_path(name).read_bytes())) or ""
        lines.append(f"  {name:<21} {about.splitlines()[0]}")
    return "\n".join([*lines, "", "On several GPUs: torchrun --nproc-per-node N -m mixmoe_megatron train ...", ""])


def show_commands(word: str) -> None:
    """Print the commands when asked to.

    Raises:
        MixMoEError: the word is neither a command nor a call for help.
    """
    if word not in ("-h", "--help"):
        raise MixMoEError(f"there is no command {word}; `mixmoe --help` lists them.")
    sys.stdout.write(describe_commands())


def mixmoe() -> int:
    """Run the command that `sys.argv` names, with the words that follow, and return its exit status."""
    name, *words = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        return run_command(lambda: show_commands(name))
    sys.argv = [f"mixmoe {name}", *words]
    status: int = runpy.run_path(str(command_path(name)))["main"]()
    return status


if __name__ == "__main__":
    sys.exit(mixmoe())
