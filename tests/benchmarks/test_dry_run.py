"""Every GPU benchmark on tiny shapes on the CPU: mistakes in the scripts show without a GPU."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path

import goals
import gpu_every_kernel
import pytest
import torch

CHECK = Path(__file__).resolve().parents[2] / "benchmarks/gpu_check.sh"
SCRIPTS = {
    "accuracy": "bench_accuracy_cuda",
    "backward": "bench_backward_cuda",
    "block_sparse_mm": "bench_block_sparse_mm_cuda",
    "ceilings": "gpu_ceilings",
    "init": "bench_init_cuda",
    "shared_mlp": "bench_shared_mlp_cuda",
    "tuning": "tune",
}

pytestmark = [
    pytest.mark.usefixtures("single_thread"),
    pytest.mark.filterwarnings("ignore:Sparse"),  # torch calls its own rivals unfinished
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, single_thread):
    """A folder of result files, one of each script."""
    folder = tmp_path_factory.mktemp("results")
    for name, script in SCRIPTS.items():
        code = importlib.import_module(script).main(["--dry-run", "--out", str(folder / f"{name}.json")])
        assert code == 0, name
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(folder, name):
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["dry_run"] is True
    assert content["benchmark"] == name
    rows = content["rows"]
    assert rows
    assert not any("skipped" in row for row in rows)
    if name != "ceilings":  # some rivals need a GPU
        assert not any("error" in row or "rival_errors" in row for row in rows)


def test_a_dry_run_is_not_judged(folder):
    verdicts = goals.judge_all(goals.read_results(folder))
    assert {verdict.verdict for verdict in verdicts} == {goals.NOT_MEASURED}
    assert all("dry run" in verdict.note for verdict in verdicts)


def test_every_goal_finds_its_rows(folder):
    results = {name: content | {"dry_run": False} for name, content in goals.read_results(folder).items()}
    unanswered = [verdict for verdict in goals.judge_all(results) if verdict.value is None]
    assert [verdict.goal.measure for verdict in unanswered] == ["memory_ratio"]  # a CPU's is not counted


def test_a_quick_run_answers_most_groups(tmp_path):
    for name in ("shared_mlp", "block_sparse_mm"):
        importlib.import_module(SCRIPTS[name]).main(
            ["--dry-run", "--quick", "--out", str(tmp_path / f"{name}.json")]
        )
    results = {name: content | {"dry_run": False} for name, content in goals.read_results(tmp_path).items()}
    answered = {verdict.goal.id for verdict in goals.judge_all(results) if verdict.value is not None}
    assert answered == {"G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G9", "G16", "G17"}


def test_a_spent_budget_is_told(tmp_path):
    path = tmp_path / "shared_mlp.json"
    script = importlib.import_module(SCRIPTS["shared_mlp"])
    assert script.main(["--dry-run", "--budget", "0", "--out", str(path)]) == 0
    assert all("skipped" in row for row in json.loads(path.read_text())["rows"])


def test_without_a_gpu_the_scripts_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(SCRIPTS["backward"]).main(["--out", str(tmp_path / "x.json")])
    assert "no CUDA GPU is visible" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["nan", "basis", "coefficients"])
def test_wrong_factors_are_errors(tmp_path, monkeypatch, wrong):
    right = torch.ops.fips.batched_rsvd

    def rsvd(w, rank, **options):
        u, s, vh = right(w, rank, **options)
        if wrong == "nan":
            return u * float("nan"), s, vh
        return (u.roll(1, 1), s, vh) if wrong == "basis" else (u, s.flip(1), vh)

    monkeypatch.setattr(torch.ops.fips, "batched_rsvd", rsvd)
    path = tmp_path / "init.json"
    assert importlib.import_module(SCRIPTS["init"]).main(["--dry-run", "--out", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert {row["method"] for row in rows if "wrong result: excess residual" in row.get("error", "")} == {
        "rsvd"
    }
    assert all(("error" in row) == (row["method"] == "rsvd") for row in rows)


def test_every_kernel_is_called():
    assert gpu_every_kernel.main(["--dry-run"]) == 0


def test_kernels_are_found_in_the_sources():
    sources = [*gpu_every_kernel.SOURCES.glob("*.cu"), *gpu_every_kernel.SOURCES.glob("*.cuh")]
    text = "\n".join(path.read_text() for path in sources)
    uses = len(re.findall(r"^ *FIPS_KERNEL\(", text, re.MULTILINE))
    names = gpu_every_kernel.kernel_names(gpu_every_kernel.SOURCES, 90)
    assert len(names) == uses
    launched = [f"void fips::cuda::(anonymous namespace)::{name}<float, 3>(Task)" for name in names[1:]]
    assert gpu_every_kernel.not_run(names, launched) == names[:1]


@pytest.mark.parametrize(
    ("option", "code", "words"), [("--help", 0, "--dry-run"), ("--x", 2, "allowed: --quick")]
)
def test_the_check_explains_its_options(option, code, words):
    done = subprocess.run(["bash", str(CHECK), option], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
