"""save_pretrained: all or nothing, and never over something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fips_ext
from fips_ext.checkpoint import save_pretrained
from fips_ext.errors import CheckpointError, InvalidArgument
from fips_ext.recipe import Recipe

from .toy import compressed_toy, dense_toy, load_toy, save_toy

pytestmark = pytest.mark.usefixtures("single_thread")

_SAVE_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from fips_ext.checkpoint import save_pretrained
from fips_ext.errors import CheckpointError
from tests.checkpoint.toy import compressed_toy

model = compressed_toy()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        save_pretrained(model, Path(sys.argv[1]), overwrite=True)
    except CheckpointError as error:
        print(error)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_alone(folder: Path) -> None:
    """No temporary directory is left beside ``folder``."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_existing_checkpoint_is_refused(tmp_path: Path) -> None:
    save_toy(tmp_path / "toy")
    before = contents(tmp_path / "toy")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_toy(tmp_path / "toy")
    assert contents(tmp_path / "toy") == before


def test_overwrite_replaces_it(tmp_path: Path) -> None:
    save_toy(tmp_path / "toy")
    (tmp_path / "toy" / "left-over").touch()
    model = save_toy(tmp_path / "toy", overwrite=True)
    assert set(contents(tmp_path / "toy")) == {"model.safetensors", "fips.json", "README.md"}
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        assert torch.equal(load_toy(tmp_path / "toy")(x), model(x))
    assert_alone(tmp_path / "toy")


def test_a_loaded_checkpoint_can_be_overwritten(tmp_path: Path) -> None:
    model = save_toy(tmp_path / "toy")
    save_pretrained(load_toy(tmp_path / "toy"), tmp_path / "toy", overwrite=True)
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        assert torch.equal(load_toy(tmp_path / "toy")(x), model(x))


def test_parents_are_made_and_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_toy(tmp_path / "empty")
    save_toy(tmp_path / "a" / "b")
    assert (tmp_path / "empty" / "fips.json").is_file()
    assert (tmp_path / "a" / "b" / "fips.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_anything_else_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("important")
    (tmp_path / "file").write_text("important")
    for name in ("home", "file"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            save_toy(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "important"
    assert (tmp_path / "file").read_text() == "important"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_toy(tmp_path / "toy")
    before = contents(tmp_path / "toy")
    # Nothing fits, then the header, then half of the weights, then all but their last byte.
    weights = len(before["model.safetensors"])
    limits = (0, 1000, weights // 2, weights - 1)
    roots = [str(Path(fips_ext.__file__).parents[1]), str(Path(__file__).parents[2])]
    # Python ignores SIGXFSZ, so a write beyond the limit fails as one on a full disk does.
    result = subprocess.run(
        [sys.executable, "-c", _SAVE_ON_A_FULL_DISK, str(tmp_path / "toy"), *map(str, limits)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
    )
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    assert len(messages) == len(limits)
    assert all("could not be written" in m and "is unchanged" in m for m in messages)
    assert contents(tmp_path / "toy") == before
    assert_alone(tmp_path / "toy")


class Interrupted:
    """A tokenizer whose saving fails in the middle."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "half").touch()
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), OSError("no space")])
def test_any_failure_leaves_the_old_checkpoint(tmp_path: Path, error: BaseException) -> None:
    save_toy(tmp_path / "toy")
    before = contents(tmp_path / "toy")
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save_toy(tmp_path / "toy", tokenizer=Interrupted(error), overwrite=True)
    assert contents(tmp_path / "toy") == before
    assert_alone(tmp_path / "toy")


def test_a_failed_swap_brings_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy(tmp_path / "toy")
    before = contents(tmp_path / "toy")
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError("I/O error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(CheckpointError, match="is unchanged"):
        save_toy(tmp_path / "toy", overwrite=True)
    assert contents(tmp_path / "toy") == before
    assert_alone(tmp_path / "toy")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no SharedMLP"):
        save_pretrained(dense_toy(), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_part_without_the_owner_of_its_bases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save the whole model"):
        save_pretrained(compressed_toy().blocks[1:], tmp_path / "toy")


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        save_pretrained(compressed_toy().to("meta"), tmp_path / "toy")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Counter(torch.nn.Module):
        def get_extra_state(self) -> int:
            return 3

    model = compressed_toy()
    model.counter = Counter()
    with pytest.raises(CheckpointError, match=r"counter\._extra_state is a int"):
        save_pretrained(model, tmp_path / "toy")


def test_a_dtype_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = compressed_toy()
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"phases is torch\.complex64"):
        save_pretrained(model, tmp_path / "toy")


def test_a_recipe_or_report_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="report: cannot be written as JSON"):
        save_toy(tmp_path / "toy", recipe=Recipe(ratio=0.5), report={"model": object()})
    assert not (tmp_path / "toy").exists()


def test_every_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    save_pretrained(compressed_toy(), tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes
