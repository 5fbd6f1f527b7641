"""diagnose and ``fips doctor``: what they find, and that they tell broken from absent."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fips_ext import _library, checkpoint, diagnosis, functional
from fips_ext.cli import app
from fips_ext.diagnosis import State, diagnose, examine

from .tiny_models import build, share

pytestmark = pytest.mark.usefixtures("single_thread")


def states() -> dict[str, State]:
    return {finding.name: finding.state for finding in diagnose()}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    model, _ = build("llama")
    share(model, rank=4)
    checkpoint.save_pretrained(model, tmp_path / "small")
    return tmp_path / "small"


def test_a_sound_installation() -> None:
    found = {finding.name: finding for finding in diagnose()}
    assert found["torch"].detail == torch.__version__
    assert json.loads(torch.ops.fips.build_info())["cpu_isa"] in found["CPU"].detail
    assert found["kernels on cpu"].state is State.OK
    assert "bfloat16" in found["kernels on cpu"].detail
    assert not [finding for finding in found.values() if finding.state is State.BROKEN]


def test_wrong_kernels_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.shared_mlp
    monkeypatch.setattr(functional, "shared_mlp", lambda x, **options: right(x, **options) + 1)
    assert states()["kernels on cpu"] is State.BROKEN


def test_a_missing_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_load_error", "it is not there")
    found = {finding.name: finding for finding in diagnose()}
    assert found["ops"].state is State.BROKEN
    assert "it is not there" in found["ops"].detail
    assert found["ops"].cure


def test_a_gpu_without_kernels_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    built = {**json.loads(torch.ops.fips.build_info()), "cuda": False}
    monkeypatch.setattr(diagnosis, "_build_info", lambda: built)
    gpu = next(finding for finding in diagnose() if finding.name == "GPU")
    assert gpu.state is State.BROKEN
    assert "FIPS_WITH_CUDA" in gpu.cure


def test_an_absent_package_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    gguf = next(finding for finding in diagnose() if finding.name == "gguf")
    assert (gguf.state, gguf.cure) == (State.MISSING, "pip install 'fips_ext[transformers]'")
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "pip install 'fips_ext[transformers]'" in shown.stdout


def test_a_checkpoint(small: Path) -> None:
    assert examine(small).state is State.OK
    assert "3 MLPs" in examine(small).detail
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert examine(small).state is State.BROKEN
    assert examine(small / "nothing").state is State.BROKEN


def test_the_command(small: Path) -> None:
    sound = CliRunner().invoke(app, ["doctor", str(small), "--json"])
    result = json.loads(sound.stdout)
    assert (sound.exit_code, result["sound"]) == (0, True)
    assert {"fips_ext", "CPU", f"checkpoint {small}"} <= {finding["name"] for finding in result["findings"]}
    (small / "fips.json").write_text("{")
    broken = CliRunner().invoke(app, ["doctor", str(small)])
    assert broken.exit_code == 1
    assert "broken" in broken.stdout
