"""Whatever is missing, cut off or altered in a checkpoint is named, and the newest whole iteration is offered."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.checkpoint.health import find_damage, saved_iterations, whole_iteration
from mixmoe_megatron.checkpoint.megatron_checkpoint import COMMON_STATE_KEY, TRACKER_FILE, stored_entries
from mixmoe_megatron.checkpoint.torch_dist_writer import write_torch_dist
from mixmoe_megatron.cli import EXIT_BAD_INPUT, whole_file
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.mappings import lazy
from tools.check_checkpoint import main

VALUES = torch.arange(1200.0).reshape(40, 30)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint with the iterations 2 and 4, of which the tracker file names the second."""
    names = ("embedding.weight", "output.weight")
    plan = [lazy(name, VALUES) for name in names]
    write_torch_dist(tmp_path, plan, {}, stacked_layers=0)
    (tmp_path / "release").rename(tmp_path / "iter_0000002")
    shutil.copytree(tmp_path / "iter_0000002", tmp_path / "iter_0000004")
    (tmp_path / TRACKER_FILE).write_text("4")
    return tmp_path


def tensors(directory: Path) -> Path:
    return directory / "__0_0.distcp"


def start_of_values(path: Path) -> int:
    """Where the first tensor's values begin in the file."""
    return path.read_bytes().index(VALUES.numpy().tobytes())


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def alter(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def alter_common_state(directory: Path) -> None:
    entry = next(entry for entry in stored_entries(directory) if entry.key == COMMON_STATE_KEY)
    path = directory / entry.file
    alter(path, path.read_bytes().index(b"checkpoint_version", entry.offset))


def pickle_of_another_class(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")


#: what happens to an iteration -> (how, what the message must hold)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda d: (d / ".metadata").unlink(), ".metadata is missing, saving was interrupted"),
    "empty metadata": (lambda d: cut(d / ".metadata", 0), ".metadata cannot be read"),
    "cut metadata": (lambda d: cut(d / ".metadata", 300), ".metadata cannot be read"),
    "hostile metadata": (pickle_of_another_class, ".metadata cannot be read (UnpicklingError: os.system"),
    "no format": (lambda d: (d / "metadata.json").unlink(), "metadata.json cannot be read"),
    "empty format": (lambda d: cut(d / "metadata.json", 0), "metadata.json cannot be read"),
    "another format": (lambda d: (d / "metadata.json").write_text("[]"), "does not name the format torch_dist"),
    "no tensors": (lambda d: tensors(d).unlink(), "lacks __0_0.distcp, which holds embedding.weight"),
    "empty tensors": (lambda d: cut(tensors(d), 0), "is truncated: it ends before embedding.weight (0 bytes, "),
    "last byte lost": (
        lambda d: cut(tensors(d), tensors(d).stat().st_size - 1),
        "is truncated: it ends before output.weight",
    ),
    "damaged common state": (alter_common_state, f"has altered bytes in {COMMON_STATE_KEY}"),
    "cut common.pt": (lambda d: (d / "common.pt").write_bytes(b"PK\3\4"), "common.pt has altered bytes"),
    "not there": (shutil.rmtree, "iter_0000004 does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_earlier_iteration_offered(run: Path, damage: str) -> None:
    make, message = DAMAGES[damage]
    make(run / "iter_0000004")
    with pytest.raises(MixMoEError) as caught:
        whole_iteration(run, flag="--ckpt-step")
    sentence = str(caught.value)
    assert message in sentence
    assert str(run / "iter_0000004") in sentence or "iter_0000004 of" in sentence
    assert "iter_0000002: " in sentence
    assert "\n" not in sentence
    assert whole_iteration(run, 2).name == "iter_0000002"


def test_the_offer_is_a_command_where_there_is_no_flag(run: Path) -> None:
    (run / "iter_0000004" / ".metadata").unlink()
    with pytest.raises(MixMoEError, match=rf"`echo 2 > {run / TRACKER_FILE}` chooses it"):
        whole_iteration(run)
    with pytest.raises(MixMoEError, match="--ckpt-step 2 chooses it"):
        whole_iteration(run, flag="--ckpt-step")


@pytest.mark.parametrize("content", ["", "   ", "4x", "\0\0", "-1"])
def test_a_senseless_tracker_file_is_not_guessed_at(run: Path, content: str) -> None:
    (run / TRACKER_FILE).write_text(content)
    with pytest.raises(MixMoEError, match=rf"iter_0000004: `echo 4 > {run / TRACKER_FILE}` chooses it"):
        whole_iteration(run, flag="--ckpt-step")


def test_nothing_whole_is_said_so(run: Path) -> None:
    for iteration in (2, 4):
        (run / f"iter_{iteration:07d}" / ".metadata").unlink()
    with pytest.raises(MixMoEError, match=r"No other iteration in .* is whole"):
        whole_iteration(run)


def test_an_unreferenced_partial_iteration_does_no_harm(run: Path) -> None:
    (run / "iter_0000006").mkdir()
    (run / "iter_0000006" / "__0_0.distcp").write_bytes(b"PK")
    assert whole_iteration(run).name == "iter_0000004"
    assert [path.name for path in saved_iterations(run)] == ["iter_0000002", "iter_0000004", "iter_0000006"]


def test_every_altered_bit_of_a_tensor_is_found_by_the_full_check_only(run: Path) -> None:
    directory = run / "iter_0000004"
    path = tensors(directory)
    start = start_of_values(path)
    for _ in range(20):
        position = start + random.randrange(VALUES.nbytes)
        alter(path, position)
        assert find_damage(directory) is None
        assert "has altered bytes in embedding.weight" in str(find_damage(directory, full=True))
        alter(path, position)
    assert find_damage(directory, full=True) is None


def test_metadata_that_names_a_file_elsewhere_is_refused(run: Path) -> None:
    directory = run / "iter_0000004"
    content = (directory / ".metadata").read_bytes()
    name = tensors(directory).name.encode()
    (directory / ".metadata").write_bytes(content.replace(name, b"../" + name[3:]))
    assert "which is not a file of" in str(find_damage(directory))


def test_random_damage_never_ends_in_a_traceback(run: Path) -> None:
    directory = run / "iter_0000004"
    whole = (directory / ".metadata").read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            content[random.randrange(len(content))] = random.randrange(256)
        (directory / ".metadata").write_bytes(content[: random.choice([None, random.randrange(len(content))])])
        find_damage(directory)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps(1))
    with pytest.raises(OSError, match="No space"), whole_file(path) as stream:
        stream.write("half of")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "1"
    assert [found.name for found in tmp_path.iterdir()] == ["value.json"]


def test_the_command_lists_iterations_and_ends_with_2_when_the_newest_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "iter_0000002  whole",
        "iter_0000004  whole",
        "training goes on from iter_0000004",
    ]
    path = tensors(run / "iter_0000004")
    alter(path, start_of_values(path))
    assert main([str(run), "--full"]) == EXIT_BAD_INPUT
    output = capsys.readouterr()
    assert f"iter_0000004  damaged: {path} has altered bytes in embedding.weight" in output.out
    assert "error: iter_0000004 of" in output.err
    assert "The newest other one that is whole is iter_0000002" in output.err
    assert main([str(run / "missing")]) == EXIT_BAD_INPUT
