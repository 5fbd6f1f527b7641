"""Every command and program of the documentation runs, the errors it explains exist, links lead somewhere.

Commands run on a tiny model in a folder that has what they name (MODEL, small, my.txt, …), with less text and
training than they ask for. What builds and installs is run by ``make test`` and ``.ci/run`` themselves.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import fips_ext
from fips_ext import BlockSparse, checkpoint
from fips_ext.cli import app
from fips_ext.models import load_image_model
from fips_ext.recipe import Recipe

from .images import save_images, save_vit
from .tiny_llama import byte_tokenizer, save_text, save_tiny_llama, tiny_llama
from .tiny_models import share

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *(ROOT / "docs").glob("*.md")]
)
MODELS = ("MODEL", "my-llama", "path/to/a/transformers/folder")
CHECKPOINTS = ("small", "out", "demo-out", "DIR")
VIT, SMALL_VIT = "MY_VIT", "small-vit"
SIZES = {"hidden_size": 128, "intermediate_size": 384}
TEXTS = ("my.txt", "text.txt", "calibration.txt")
# Less of everything, for the commands that take it and were not given it.
LESS = {
    "compress": {"--tokens": "2048", "--steps": "1"},
    "compare": {
        "--tokens": "2048",
        "--steps": "1",
        "--distill-steps": "0",
        "--windows": "1",
        "--methods": "pruning:bitmap,low-rank",
    },
    "eval": {"--windows": "1"},
    "bench": {"--prompt-tokens": "8", "--new-tokens": "2", "--repeats": "1"},
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            block = Block(str(page.relative_to(ROOT)), line, match[1], match[2])
            found += [block] * (match[1] in languages)
    return found


def commands() -> list[tuple[str, str]]:
    """Every line of a shell block, with the place of the block."""
    return [
        (f"{block}", line) for block in blocks("bash") for line in block.code.splitlines() if line.strip()
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The models, checkpoints, texts and images that the documentation names."""
    folder = tmp_path_factory.mktemp("docs")
    for name in MODELS:
        (folder / name).mkdir(parents=True)
        save_tiny_llama(folder / name, **SIZES)
    model = tiny_llama(**SIZES)
    share(model)
    for name in CHECKPOINTS:
        checkpoint.save_pretrained(
            model, folder / name, recipe=Recipe(ratio=0.5), tokenizer=byte_tokenizer(), overwrite=True
        )
    for name in TEXTS:
        save_text(folder / name)
    save_vit(folder / VIT, classes=3)
    processor = "preprocessor_config.json"
    vit, _ = load_image_model(folder / VIT)
    share(vit)
    checkpoint.save_pretrained(vit, folder / SMALL_VIT)
    shutil.copy(folder / VIT / processor, folder / SMALL_VIT / processor)
    save_images(folder / "photos", {"any": 128})
    save_images(folder / "imagenet/val", {"a": 1, "b": 2, "c": 1})
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it as the working directory; the demo's model is the tiny one."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fips_ext.models.demo_file", lambda: folder / "MODEL")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("where", "line"), commands())
def test_a_command(where: str, line: str, here: Path, monkeypatch, capsys) -> None:
    *before, last = line.split(" | ")
    words = shlex.split(last, comments=True)
    program = Path(words[0]).name
    if program == "fips":
        run_fips(words[1:])
    elif program == "torchrun":
        assert words[3:6] == ["-m", "fips_ext", "compress"]
        less = [word for option, value in LESS["compress"].items() for word in (option, value)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], *less]
        subprocess.run(command, check=True, env=environment)
    elif program == "python" and words[1].startswith("examples/"):
        given = shlex.split(before[0])[1] if before else ""
        monkeypatch.setattr("sys.stdin", io.StringIO(given + "\n"))
        run_example(words[1], words[2:], monkeypatch)
        assert capsys.readouterr().out.strip()
    elif program == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert is_run_elsewhere(words), f"{where}: nothing runs {line!r}"


def run_fips(words: list[str]) -> None:
    name = words[0]
    if "timm:" in " ".join(words):  # tests/integrations/test_timm.py runs these; here, that the options exist
        known = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
        assert all(word in known for word in words if word.startswith("--"))
        return
    if name == "compare":  # every ratio and seed is the same again
        words = [word.partition(",")[0] if "," in word else word for word in words]
    if "--out" in words:  # what an earlier step of the page would not have left there
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    less = {option: value for option, value in LESS.get(name, {}).items() if option not in words}
    arguments = [*words, *(part for pair in less.items() for part in pair)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def run_example(path: str, arguments: list[str], monkeypatch) -> None:
    if "--out" in arguments:
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(str(ROOT / path), run_name="__main__")


def is_run_elsewhere(words: list[str]) -> bool:
    """Whether the build, ``make test`` or ``.ci/run`` runs a command of this kind."""
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "make":
        return all(
            re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE)
            for word in words[1:]
            if "=" not in word
        )
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        project = (ROOT / "pyproject.toml").read_text()
        return all(
            re.search(rf"^{extra} = \[", project, re.MULTILINE) for e in extras for extra in e.split(",")
        )
    if words[0] in ("cmake", "build/example/decode"):  # ctest takes these steps (tests/cpp/CMakeLists.txt)
        defined = {word[2:].partition("=")[0] for word in words if word.startswith("-D")}
        build = (ROOT / "CMakeLists.txt").read_text()
        return all(name.startswith("CMAKE_") or name in build for name in defined)
    return words[:2] == ["git", "clone"]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_program(block: Block, here: Path) -> None:
    for name in re.findall(r'save_pretrained\([^)]*?"(\w+)"', block.code):
        shutil.rmtree(here / name, ignore_errors=True)
    exec(compile(block.code, str(block), "exec"), arguments_of_the_op() if "torch.ops" in block.code else {})


def arguments_of_the_op() -> dict:
    up, gate, down = (
        BlockSparse.from_dense(torch.randn(32, 64), (16, 16), "block", torch.rand(32, 64) < 0.5).tensors()
        for _ in range(3)
    )
    biases = dict.fromkeys(("base_out", "up_bias", "gate_bias", "down_bias"))
    return {"x": torch.randn(3, 48), "base": torch.randn(48, 32), "hidden": 64, **biases} | {
        "up": up,
        "gate": gate,
        "down": down,
    }


def test_the_examples_are_listed() -> None:
    page = (ROOT / "examples/README.md").read_text()
    for path in (ROOT / "examples").iterdir():
        assert path.name == "README.md" or f"`{path.name}" in page


def test_every_explained_error_exists() -> None:
    """The messages that docs/troubleshooting.md quotes are written somewhere in the sources."""
    sources = [
        *(ROOT / "python").rglob("*.py"),
        *(ROOT / "cmake").glob("*.cmake"),
        *(ROOT / "csrc").rglob("*.cpp"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    written = re.sub(r'"\s*\n\s*f?"', "", text)  # one message over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        part
        for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for part in re.findall("`(.*?)`", row)
    ]
    assert len(quoted) > 25
    assert [message for message in quoted if message not in written] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_in_the_changelog() -> None:
    assert fips_ext.__version__ in (ROOT / "CHANGELOG.md").read_text()
