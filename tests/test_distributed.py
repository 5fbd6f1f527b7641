"""Two processes, and three for two groups: what one process makes, but for rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .tiny_llama import save_text, save_tiny_llama

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds: processes that wait for each other do so for ever
TOLERANCE = 1e-3  # of the RMS of each tensor; sums of parts are rounded otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_llama(folder / "model")
    save_text(folder / "text.txt")
    return folder


def torchrun(folder: Path, code: str, processes: int) -> subprocess.CompletedProcess:
    """Runs a program of its own in several processes."""
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(processes),
                "--standalone",
            ),
            str(script),
        ],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def start(folder: Path, processes: int, out: str, *options: str) -> subprocess.Popen:
    """`fips compress`, by torchrun if there is more than one process."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    command += ["fips_ext", "compress", str(folder / "model"), "--out", str(folder / out)]
    command += ["--calib", str(folder / "text.txt"), "--ratio", "0.6", "--tokens", "2048", "--steps", "6"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *options], env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )


def compress(folder: Path, processes: int, out: str, *options: str) -> subprocess.CompletedProcess:
    job = start(folder, processes, out, *options)
    output, errors = job.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(job.args, job.returncode, output, errors)


def largest_difference(first: Path, second: Path) -> float:
    """Of any element of two checkpoints of the same tensors, relative to the RMS of its tensor."""
    a, b = (load_file(path / "model.safetensors") for path in (first, second))
    found = [0.0]
    for name, tensor in a.items():
        if tensor.is_floating_point() and tensor.numel():
            scale = tensor.float().square().mean().sqrt().clamp_min(1e-30)
            found.append(float((tensor - b[name]).abs().max() / scale))
    return max(found)


def assert_equal_but_for_rounding(first: Path, second: Path) -> None:
    assert largest_difference(first, second) <= TOLERANCE
    a, b = (load_file(path / "model.safetensors") for path in (first, second))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape, name
        if not tensor.is_floating_point():
            assert torch.equal(tensor, b[name]), name
    reports = [json.loads((path / "fips.json").read_text())["report"] for path in (first, second)]
    for key in ("mlp_ratio", "calibration_tokens"):
        assert reports[0][key] == reports[1][key]


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ["--group-size", "2"]),
        (3, ["--group-size", "2", "--base", "shared", "--distill-steps", "3", "--tokens", "5000"]),
        (2, ["--group-size", "4", "--pattern", "block:16x16", "--base", "both", "--ratio", "0.95"]),
    ],
)
def test_as_one_process(folder, request, processes, options) -> None:
    name = str(abs(hash(request.node.name)))
    one = compress(folder, 1, f"one-{name}", *options)
    assert one.returncode == 0, one.stderr
    several = compress(folder, processes, f"several-{name}", *options)
    assert several.returncode == 0, several.stderr
    assert_equal_but_for_rounding(folder / f"one-{name}", folder / f"several-{name}")
    assert not (folder / f"several-{name}.partial").exists()


def test_a_process_that_dies_fails_the_job_and_the_next_goes_on(folder) -> None:
    options = ["--group-size", "1", "--steps", "300"]
    expected = compress(folder, 2, "whole", *options)
    assert expected.returncode == 0, expected.stderr
    job = start(folder, 2, "killed", *options)
    kept = folder / "killed.partial"
    end = time.monotonic() + TIMEOUT
    while not list(kept.glob("group-*.json")):
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, said = job.communicate(timeout=TIMEOUT)
    assert job.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said
    assert not (folder / "killed").exists()
    assert list(kept.glob("group-*.json"))
    again = compress(folder, 2, "killed", *options)
    assert again.returncode == 0, again.stderr
    assert "going on with the" in again.stderr
    assert_equal_but_for_rounding(folder / "whole", folder / "killed")


# A mesh keeps its process group, whose threads may let go of a tensor while the interpreter ends, which is an
# abort (pytorch/pytorch#179291). So it does not end.
TENSOR_PARALLEL = """
import copy, os, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from fips_ext import distributed
from fips_ext.nn import SharedMLPParallel, SparseFactor
from tests.tiny_models import GatedMLP, PlainMLP, Stack, share
with distributed.processes():
    mesh = init_device_mesh("cpu", (distributed.size(),))
    for encoding in ("block", "bitmap"):
        for bits in (None, 8, 4):
            torch.manual_seed(0)
            model = Stack(PlainMLP(hidden=200), GatedMLP(hidden=128), PlainMLP(hidden=96)).eval()
            share(model, rank=16, encoding=encoding, per_role=bits is None)
            for factor in (m for m in model.modules() if isinstance(m, SparseFactor) and bits):
                factor.round_to(bits)
                factor.quantise()
            x = torch.randn(2, 5, 32)
            with torch.no_grad():
                expected = model(x)
                parts = parallelize_module(copy.deepcopy(model), mesh, {"blocks.*.mlp": SharedMLPParallel()})
                torch.testing.assert_close(parts(x), expected, rtol=1e-5, atol=1e-5)
            mlps = [m.blocks[1].mlp for m in (model, parts)]
            stored = [sum(f.values.numel() for f in mlp.factors().values()) for mlp in mlps]
            assert stored[1] < 0.75 * stored[0], stored
    distributed.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_tensor_parallel_inference(tmp_path, processes) -> None:
    done = torchrun(tmp_path, TENSOR_PARALLEL, processes)
    assert done.returncode == 0, done.stderr


OBSERVED = """
import os, torch
from fips_ext import distributed
from fips_ext.errors import NumericalError
from fips_ext.surgery import find_mlps
from fips_ext.train import observe
from tests.tiny_models import build
torch.manual_seed(0)
mlp = find_mlps(build("llama")[0])[0]
x = torch.randn(9000, mlp.width) * (1 + 30 * (torch.rand(9000, 1) < 0.01))
with distributed.processes():
    team = distributed.Teams(1).of(0)
    assert team.size == distributed.size()
    targets = [torch.full_like(x, torch.nan) for _ in range(2)]
    alone = observe(mlp, x, targets[0], torch.float32, 1000)
    shared = observe(mlp, x, targets[1], torch.float32, 1000, team)
    assert torch.equal(*targets)
    assert torch.equal(alone.weights, shared.weights)
    for name in ("power", "metric", "energy"):
        torch.testing.assert_close(getattr(shared, name), getattr(alone, name))
    x[5000] = torch.nan  # a row that one of them sees
    try:
        observe(mlp, x, targets[1], torch.float32, 1000, team)
    except NumericalError:
        distributed.barrier()
    else:
        raise AssertionError(f"process {distributed.rank()} saw nothing")
os._exit(0)  # see above
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_a_team_shares_out_the_rows(tmp_path, processes) -> None:
    done = torchrun(tmp_path, OBSERVED, processes)
    assert done.returncode == 0, done.stderr


REUSED = """
import copy, torch
from fips_ext import Recipe, calibrate, compress, distributed
from tests.tiny_models import build
torch.manual_seed(0)
model, x = build("llama")
def factors(size):
    recipe = Recipe(ratio=0.8, calibration_tokens=96, steps=0, group_size=size)
    compressed = copy.deepcopy(model)
    compress(compressed, recipe, data)
    return compressed.state_dict()
with distributed.processes():
    with calibrate(model, [x] * 8, 96) as data:
        again = [factors(size) for size in (1, 4)][1]  # what one has seen then, the other has not
    with calibrate(model, [x] * 8, 96) as data:
        anew = factors(4)
    for name, tensor in anew.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-3)
"""


def test_a_calibration_serves_two_compressions(tmp_path) -> None:
    done = torchrun(tmp_path, REUSED, 2)
    assert done.returncode == 0, done.stderr


DIFFERENT = """
import torch
from fips_ext import Recipe, compress, distributed
from tests.tiny_models import build
torch.manual_seed(0)
model, x = build("llama")
with distributed.processes():
    size = 1 + 2 * distributed.rank() if OTHER == "recipe" else 2
    if OTHER == "calibration":
        x = (x + distributed.rank()) % 64
    compress(model, Recipe(ratio=0.8, calibration_tokens=96, steps=0, group_size=size), [x] * 8)
"""


@pytest.mark.parametrize("other", ["calibration", "recipe"])
def test_nodes_must_have_the_same(tmp_path, other) -> None:
    """Every process is given its own text or recipe here, as nodes with other files or options would have."""
    done = torchrun(tmp_path, f"OTHER = {other!r}\n{DIFFERENT}", 2)
    assert done.returncode != 0
    assert f"have another {other}; give every node the same files and options" in done.stderr
