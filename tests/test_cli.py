"""The ``fips`` command: what it writes where, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from fips_ext import checkpoint
from fips_ext.cli import app
from fips_ext.cli.compare import print_whole, rich_table
from fips_ext.comparison.table import Table
from fips_ext.evaluate import perplexity
from fips_ext.integrations.text import read_text, token_windows
from fips_ext.models import load_model
from fips_ext.recipe import Recipe

from .tiny_llama import byte_tokenizer, save_text, save_tiny_llama, tiny_llama
from .tiny_models import share

COMMANDS = ("compress", "compare", "eval", "generate", "info", "bench", "demo", "report", "doctor")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models gain nothing from more, and on a busy machine the threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A checkpoint that computes what the dense model computes."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny_llama()
    share(model)
    checkpoint.save_pretrained(model, folder, recipe=Recipe(ratio=0.5), tokenizer=byte_tokenizer())
    return folder


class Calls(list):
    """The arguments of every compression, in place of which MLPs are merely shared."""

    def compress(self, model, recipe, data, progress=None, journal=None):
        self.append((recipe, data, next(model.parameters()).dtype))
        share(model)
        return Report()


class Report:
    def to_dict(self):
        return {"ratio": 0.5}

    def to_markdown(self):
        return "| ratio |\n|---|\n| 0.5 |"


@pytest.fixture
def compressions(monkeypatch) -> Calls:
    calls = Calls()
    module = ModuleType("fips_ext._compress")
    module.compress = calls.compress
    monkeypatch.setitem(sys.modules, "fips_ext._compress", module)
    return calls


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments) -> dict:
    return json.loads(run(*arguments, "--json").stdout)


def refusal(*arguments) -> str:
    """The one line that a failing command writes."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# -- help and usage ---------------------------------------------------------------------------------


def test_help_names_every_command():
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "demo:smollm2" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example(command):
    assert f"fips {command} " in run(command, "--help").stdout


def test_runs_as_a_module():
    command = [sys.executable, "-m", "fips_ext", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("fips_ext ")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("fips com", ["compress", "compare"]), ("fips compress --exc", ["--exclude"])],
)
def test_shells_complete(typed: str, expected: list[str]):
    words = typed.split()
    environment = {"_FIPS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    command = [Path(sys.executable).parent / "fips"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.stdout.split() == expected, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["compress", "x", "--out", "y"],
        ["compress", "x", "--ratio", "0.5"],
        ["compress", "x", "--out", "y", "--ratio", "0"],
        ["compress", "x", "--out", "y", "--ratio", "1.5"],
        ["compress", "x", "--out", "y", "--ratio", "half"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--pattern", "block:7x7"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--base", "none"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--bits", "3"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--budget", "macs"],  # of a bitmap
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--dtype", "int8"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--group-size", "0"],
        ["compress", "x", "--out", "y", "--ratio", "0.5", "--steps", "-1"],
        ["eval"],
        ["eval", "x", "--context", "1"],
        ["generate", "x"],
        ["bench", "x", "--repeats", "0"],
        ["demo", "--ratio", "2"],
        ["compare", "x", "--ratios", "0.5,half"],
        ["compare", "x", "--ratios", "1.5"],
        ["compare", "x", "--ratios", ""],
        ["compare", "x", "--seeds", "-1"],
        ["compare", "x", "--patterns", "block:7x7"],
        ["compare", "x", "--patterns", "dense"],
        ["compare", "x", "--methods", "fips"],
    ],
)
def test_usage_errors(arguments):
    assert "Traceback" not in run(*arguments, code=2).output


# -- compress ---------------------------------------------------------------------------------------


def test_compress_writes_a_checkpoint(dense, text, tmp_path, compressions):
    out = tmp_path / "out"
    options = ["--pattern", "block:16x32", "--group-size", 2, "--rank", 8, "--base", "both", "--tokens", 2000]
    options += ["--steps", 3, "--seed", 5, "--dtype", "bfloat16"]
    result = run_json("compress", dense, "--out", out, "--ratio", 0.5, "--calib", text, *options)
    assert result["report"] == {"ratio": 0.5}
    ((recipe, data, dtype),) = compressions
    assert recipe == Recipe(
        ratio=0.5,
        pattern="block:16x32",
        group_size=2,
        rank=8,
        base="both",
        calibration_tokens=2000,
        steps=3,
        seed=5,
    )
    assert dtype == torch.bfloat16
    assert {batch.dtype for batch in data} == {torch.int64}
    assert sum(batch.numel() for batch in data) == 2048
    assert checkpoint.info(out)["recipe"] == recipe.to_dict()
    assert load_model(out)[1]("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_compress_to_codes_and_in_multiply_adds(dense, text, tmp_path, compressions):
    arguments = ["compress", dense, "--ratio", 0.5, "--calib", text]
    run(*arguments, "--out", tmp_path / "codes", "--bits", 4)
    run(*arguments, "--out", tmp_path / "macs", "--budget", "macs", "--pattern", "block:16x16")
    assert compressions[0][0] == Recipe(ratio=0.5, bits=4)
    assert compressions[1][0] == Recipe(ratio=0.5, budget="macs", pattern="block:16x16")


def test_compress_defaults_are_those_of_the_recipe(dense, text, tmp_path, compressions):
    output = run("compress", dense, "--out", tmp_path / "out", "--ratio", 0.5, "--calib", text).stdout
    assert compressions[0][0] == Recipe(ratio=0.5)
    assert "0.5" in output
    assert f"fips eval {tmp_path / 'out'}" in output


def test_compress_overwrites_a_checkpoint_only_when_asked(dense, text, tmp_path, compressions):
    arguments = ["compress", dense, "--out", tmp_path / "out", "--ratio", 0.5, "--calib", text]
    run(*arguments)
    assert "--overwrite" in refusal(*arguments)
    assert len(compressions) == 1
    run(*arguments, "--overwrite")
    assert len(compressions) == 2


def test_compress_refuses_an_output_before_any_work(tmp_path, compressions):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    arguments = ["compress", "no-such-model", "--ratio", 0.5, "--out"]
    assert "is a file" in refusal(*arguments, tmp_path / "file")
    assert "cannot write to" in refusal(*arguments, tmp_path / "file" / "below")
    assert "cannot write to /proc" in refusal(*arguments, "/proc/small")
    assert "is not empty" in refusal(*arguments, tmp_path / "other")
    assert "other than a fips checkpoint" in refusal(*arguments, tmp_path / "other", "--overwrite")
    assert (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-model"}, "allowed are a folder saved by transformers"),
        ({"--calib": "no-such-file"}, "is not a file"),
        ({"--calib": "empty.txt"}, "is empty"),
        ({"--calib": "short.txt"}, "found 5 tokens, needed 512"),
        ({"--tokens": 10**6}, "needed 1000000 to calibrate"),
        ({"--device": "toaster"}, "allowed are 'cpu'"),
        ({"--device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_compress_refuses_inputs(dense, text, tmp_path, monkeypatch, compressions, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("short")
    options = {"model": dense, "--out": "out", "--ratio": 0.5, "--calib": text, **changes}
    model = options.pop("model")
    pairs = [part for pair in options.items() for part in pair]
    assert message in refusal("compress", model, *pairs)
    assert not Path("out").exists()
    assert not compressions


def test_compress_evaluate_generate(dense, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--ratio", 0.6, "--pattern", "bitmap:16x64", "--calib", text, "--tokens", 4000, "--steps", 3]
    report = run_json("compress", dense, "--out", out, *arguments)["report"]
    ratios = run_json("info", out)["ratios"]
    assert ratios["mlp"] == pytest.approx(report["mlp_ratio"])
    assert 0.55 < ratios["mlp"] <= 0.6
    assert run_json("eval", out, "--text", text, "--context", 256)["perplexity"] < 256**2
    assert run("generate", out, "abc", "--max-new-tokens", 4).stdout
    assert run_json("compress", dense, "--out", tmp_path / "again", *arguments)["report"]["layers"]
    files = [folder / "model.safetensors" for folder in (out, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()  # the seed decides


# -- the others -------------------------------------------------------------------------------------


def test_eval_agrees_with_the_function(small, text):
    result = run_json("eval", small, "--text", text, "--context", 64, "--windows", 5)
    model, tokenizer = load_model(small)
    expected = perplexity(model, token_windows(read_text(text), tokenizer, 64, 5))
    assert result["perplexity"] == pytest.approx(expected.perplexity)
    assert result["interval"] == pytest.approx(list(expected.interval))
    assert result["tokens"] == expected.tokens == 5 * 63


def test_eval_of_the_checkpoint_equals_dense(dense, small, text):
    options = ["--text", text, "--context", 256, "--windows", 0]
    first, second = run_json("eval", dense, *options), run_json("eval", small, *options)
    assert first["windows"] > 32
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-4)


def test_progress_in_a_log_is_a_few_lines(small, text):
    result = run("eval", small, "--text", text, "--context", 64, "--windows", 40, "--json")
    lines = [line for line in result.stderr.splitlines() if line.startswith("scoring windows: ")]
    assert [line.split()[2] for line in lines] == [str(percent) for percent in range(10, 101, 10)]
    json.loads(result.stdout)


def test_eval_prints_a_table(small, text):
    assert "perplexity" in run("eval", small, "--text", text, "--context", 64, "--windows", 2).stdout


def test_eval_refuses(dense, text, tmp_path):
    assert "at most 512" in refusal("eval", dense, "--text", text, "--context", 600)
    assert "needed 65536" in refusal("eval", dense, "--text", text, "--context", 65536)
    tiny_llama().save_pretrained(tmp_path / "bare")
    assert "tokenizer" in refusal("eval", tmp_path / "bare", "--text", text)
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"damaged")
    assert "transformers cannot load" in refusal("eval", tmp_path / "bare", "--text", text)
    tiny_llama().model.save_pretrained(tmp_path / "headless")
    assert "predicts no tokens" in refusal("eval", tmp_path / "headless", "--text", text)


def test_generate_prints_the_continuation(dense, small):
    first = run("generate", dense, "abc", "--max-new-tokens", 4).stdout
    assert run("generate", small, "abc", "--max-new-tokens", 4).stdout == first
    assert not first.startswith("abc")


def test_generate_refuses(small):
    assert "prompt" in refusal("generate", small, "")
    assert "512" in refusal("generate", small, "abc", "--max-new-tokens", 510)


def test_info(small):
    assert run_json("info", small) == checkpoint.info(small)
    output = run("info", small).stdout
    assert "ratios.mlp" in output
    assert "recipe.pattern" in output


def test_info_refuses(dense, small, tmp_path):
    assert "does not exist" in refusal("info", tmp_path / "nothing")
    assert "fips.json" in refusal("info", dense)
    (tmp_path / "fips.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    assert "fips.json" in refusal("info", tmp_path)


def test_bench(dense, small):
    options = ["--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1]
    alone = run_json("bench", small, *options)
    assert alone["decode"] > 0
    assert alone["prefill"] > 0
    pair = run_json("bench", small, "--dense", dense, *options)
    assert pair["decode_ratio"] == pytest.approx(pair["compressed"]["decode"] / pair["dense"]["decode"])
    assert "compressed / dense" in run("bench", small, "--dense", dense, *options).stdout


# -- compare ----------------------------------------------------------------------------------------


def test_compare_measures_draws_and_goes_on(dense, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["/bin/fips", "compare", "my model"])
    options = ["--text", text, "--calib", text, "--tokens", 2048, "--steps", 2, "--distill-steps", 2]
    options += ["--windows", 2, "--dtype", "float32", "--patterns", "bitmap:16x64,block:16x16", "--quick"]
    first = ["compare", dense, "--ratios", "0.7", "--methods", "fips:bitmap:16x64,low-rank", "--out", out]
    rows = run_json(*first, *options)["rows"]
    assert [row["method"] for row in rows] == ["fips:bitmap:16x64", "low-rank"]
    for row in rows:
        assert 0.6 < row["mlp_ratio"] <= 0.7
        assert list(row["quality"]) == ["distilled"]  # --quick looks once
        assert all(q[text.name]["value"] > 0 for q in row["quality"].values())
        assert row["speed"]["decode_ratio"] > 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "compare.json").read_text())
    assert written["rows"] == rows
    assert written["command"] == "fips compare 'my model'"

    result = run("compare", dense, "--ratios", "0.7,0.8", "--methods", "low-rank", "--out", out, *options)
    assert "low-rank at 0.8" in result.stderr
    assert "low-rank at 0.7" not in result.stderr  # measured before
    assert "0.8" in result.stdout
    again = json.loads((out / "compare.json").read_text())["rows"]
    assert again[:2] == rows
    assert len(again) == 3
    assert "calibrating" not in run(*first, *options).stderr

    message = refusal(*first, *options, "--windows", 1)
    assert "another setting (texts differ)" in message
    assert "named alike" in refusal(*first, *options, "--text", text)


def test_compare_cuts_no_cell(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    row = ["0.75", "pruning:block:32x32", *(f"{i}.1234567" for i in range(8))]
    table = Table("quality", ["ratio", "method", *map(str, range(8))], [row], [0])
    print_whole(rich_table(table))
    assert capsys.readouterr().out.splitlines()[-1].split() == row


def test_compare_needs_matplotlib(dense, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "fips_ext[plot]" in refusal("compare", dense)


# -- recipes in files and dry runs -------------------------------------------------------------------


def test_compress_takes_a_recipe_from_a_file(dense, text, tmp_path, compressions):
    (tmp_path / "r.yaml").write_text("ratio: 0.4\nbits: 8\nbase: identity\nexclude: ['*.0.*']\n")
    (tmp_path / "r.json").write_text(json.dumps({"ratio": 0.4, "steps": 7}))
    arguments = ["compress", dense, "--calib", text]
    run(*arguments, "--out", tmp_path / "a", "--recipe", tmp_path / "r.yaml")
    run(
        *arguments, "--out", tmp_path / "b", "--recipe", tmp_path / "r.json", "--ratio", 0.5, "--base", "both"
    )
    run(*arguments, "--out", tmp_path / "c", "--recipe", tmp_path / "a", "--seed", 3, "--include", "*mlp")
    first = Recipe(ratio=0.4, bits=8, base="identity", exclude=("*.0.*",))
    assert [recipe for recipe, _, _ in compressions] == [
        first,
        Recipe(ratio=0.5, steps=7, base="both"),
        dataclasses.replace(first, seed=3, include=("*mlp",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.yaml", None, "cannot be read"),
        ("r.yaml", "ratio: [", "is no YAML"),
        ("r.json", "{", "is no JSON"),
        ("r.yaml", "just words", "holds no recipe"),
        ("r.yaml", "", "holds no recipe"),
    ],
)
def test_compress_refuses_a_file_without_recipe(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    arguments = ["compress", "no-such-model", "--out", tmp_path / "out", "--recipe", tmp_path / name]
    assert message in refusal(*arguments)


@pytest.mark.parametrize("content", ["steps: 5", "ratio: 0.5\ntypo: 1", "ratio: 2"])
def test_compress_refuses_a_recipe_that_is_none(tmp_path, content):
    (tmp_path / "r.yaml").write_text(content)
    run("compress", "x", "--out", tmp_path / "out", "--recipe", tmp_path / "r.yaml", code=2)


def test_a_dry_run_says_what_would_be_stored(dense):
    arguments = ["compress", dense, "--ratio", 0.8, "--pattern", "bitmap:16x16", "--group-size", 1]
    arguments.append("--dry-run")
    result = run_json(*arguments)
    assert result["recipe"]["ratio"] == 0.8
    assert {group["base"][0] for group in result["groups"]} == {"U", "I"}
    assert all(group["nbytes"] <= 0.8 * group["dense_bytes"] for group in result["groups"])
    shown = run(*arguments).stdout
    assert "weight" in shown
    assert "0.8" in shown
    assert len(run_json(*arguments, "--base", "identity", "--exclude", "*.0.*")["groups"]) == 3
