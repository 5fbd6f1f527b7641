"""The demo: SmolLM2-135M compressed, measured before and after, and reloaded in a fresh process."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from .. import checkpoint
from ..errors import CheckpointError
from ..evaluate import CONTEXT, QUICK_WINDOWS, perplexity
from ..models import load_model
from ..recipe import Recipe
from ..throughput import Workload, compare
from .gguf import DEMO
from .text import calibration_windows, token_windows, wikipedia

PROMPT = "The first people to reach the island were"
SUMMARY_FILE = "summary.json"

_WORKLOAD = Workload(prompt_tokens=128, new_tokens=48, repeats=5)
_NEW_TOKENS = 40
_GENERATE_TIMEOUT = 300  # seconds

ProgressBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the demo measured; ``summary.json`` holds exactly these keys.

    Sizes are bytes, ratios are compressed over dense in the same dtype. ``linear`` counts every linear map
    of the transformer blocks, ``file`` the whole safetensors file. Perplexity is that of the reloaded
    checkpoint.
    """

    ppl_dense: float
    ppl_compressed: float
    ppl_dense_interval: tuple[float, float]
    ppl_compressed_interval: tuple[float, float]
    ppl_ratio: float
    ppl_tokens: int
    mlp_ratio: float
    linear_ratio: float
    file_ratio: float
    mlp_bytes_dense: int
    mlp_bytes_compressed: int
    linear_bytes_dense: int
    linear_bytes_compressed: int
    file_bytes_dense: int
    file_bytes_compressed: int
    decode_tps_dense: float
    decode_tps_compressed: float
    decode_ratio: float
    prefill_tps_dense: float
    prefill_tps_compressed: float
    prefill_ratio: float
    compress_seconds: float
    seconds: float
    threads: int
    prompt: str
    continuation: str


def run_demo(out: Path, recipe: Recipe, *, note: Callable[[str], None], progress_bar: ProgressBar) -> Summary:
    """Compress SmolLM2-135M in bfloat16, write the checkpoint and ``summary.json`` to ``out``.

    Args:
        out: a folder that does not exist, is empty, or holds a checkpoint (which is replaced).
        note: called with one line per stage.
        progress_bar: ``with progress_bar(what) as move: move(done, total)``.

    Raises:
        InvalidArgument: the packages with the weights or the text are missing.
        CheckpointError: the checkpoint cannot be written, or a fresh process cannot use it.
    """
    from .._compress import compress

    start = time.perf_counter()
    text = wikipedia()
    note("loading SmolLM2-135M-Instruct, dequantised to bfloat16")
    dense, tokenizer = load_model(DEMO, torch.bfloat16)
    windows = token_windows(text.held_out, tokenizer, CONTEXT, QUICK_WINDOWS)
    with progress_bar("perplexity, dense") as progress:
        ppl_dense = perplexity(dense, windows, progress)

    model = copy.deepcopy(dense)
    data = calibration_windows(text.calibration, tokenizer, recipe.calibration_tokens)
    note(f"compressing the MLPs to {recipe.ratio:.0%} of their bytes ({recipe.pattern})")
    compress_start = time.perf_counter()
    with progress_bar("compressing") as progress:
        report = compress(model, recipe, data, progress=progress)
    compress_seconds = time.perf_counter() - compress_start
    checkpoint.save_pretrained(model, out, recipe=recipe, report=report, tokenizer=tokenizer, overwrite=True)
    del model

    note(f"reloading {out}")
    reloaded, _ = load_model(out)
    with progress_bar("perplexity, compressed") as progress:
        ppl_compressed = perplexity(reloaded, windows, progress)
    note("timing both models in turns")
    speed = compare(dense, reloaded, _WORKLOAD)
    note("generating in a fresh process")
    continuation = generate_in_fresh_process(out, PROMPT, _NEW_TOKENS)

    facts = checkpoint.info(out)
    sizes, ratios, dense_sizes = facts["bytes"], facts["ratios"], facts["dense_bytes"]
    file_dense = safetensors_bytes(dense)
    summary = Summary(
        ppl_dense=ppl_dense.perplexity,
        ppl_compressed=ppl_compressed.perplexity,
        ppl_dense_interval=ppl_dense.interval,
        ppl_compressed_interval=ppl_compressed.interval,
        ppl_ratio=ppl_compressed.perplexity / ppl_dense.perplexity,
        ppl_tokens=ppl_dense.tokens,
        mlp_ratio=ratios["mlp"],
        linear_ratio=ratios["block"],
        file_ratio=sizes["file"] / file_dense,
        mlp_bytes_dense=dense_sizes["mlp"],
        mlp_bytes_compressed=sizes["total"] - sizes["other"],
        linear_bytes_dense=dense_sizes["block"],
        linear_bytes_compressed=round(ratios["block"] * dense_sizes["block"]),
        file_bytes_dense=file_dense,
        file_bytes_compressed=sizes["file"],
        decode_tps_dense=speed.dense.decode,
        decode_tps_compressed=speed.compressed.decode,
        decode_ratio=speed.decode_ratio,
        prefill_tps_dense=speed.dense.prefill,
        prefill_tps_compressed=speed.compressed.prefill,
        prefill_ratio=speed.prefill_ratio,
        compress_seconds=compress_seconds,
        seconds=time.perf_counter() - start,
        threads=torch.get_num_threads(),
        prompt=PROMPT,
        continuation=continuation,
    )
    (out / SUMMARY_FILE).write_text(
        json.dumps(dataclasses.asdict(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return summary


def safetensors_bytes(model: nn.Module) -> int:
    """Size of the tensors of a dense model's safetensors file, tied ones once, the header left out."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def generate_in_fresh_process(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """What ``python -m fips_ext generate`` prints, so that nothing of this process can help.

    Raises:
        CheckpointError: it fails; the message holds its last line.
    """
    command = [sys.executable, "-m", "fips_ext", "generate", str(folder), prompt]
    command += ["--max-new-tokens", str(max_new_tokens)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_GENERATE_TIMEOUT
        )
    except subprocess.SubprocessError as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise CheckpointError(
            f"{folder}: a fresh process could not generate from it ({lines[-1]})"
        ) from error
    return result.stdout.removesuffix("\n")


def summary_table(summary: Summary) -> Table:
    """Dense against compressed, one row per measure."""
    table = Table("SmolLM2-135M", "dense (dequantised)", "compressed", "ratio")

    def interval(value: float, bounds: tuple[float, float]) -> str:
        return f"{value:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"

    def mib(count: int) -> str:
        return f"{count / 2**20:.1f} MiB"

    table.add_row(
        f"perplexity, {summary.ppl_tokens:,} held-out tokens",
        interval(summary.ppl_dense, summary.ppl_dense_interval),
        interval(summary.ppl_compressed, summary.ppl_compressed_interval),
        f"{summary.ppl_ratio:.3f}",
    )
    table.add_section()
    for label, name in (("MLPs", "mlp"), ("all block linears", "linear"), ("model file", "file")):
        fields = (getattr(summary, f"{name}_bytes_{side}") for side in ("dense", "compressed"))
        table.add_row(label, *map(mib, fields), f"{getattr(summary, f'{name}_ratio'):.3f}")
    table.add_section()
    for label, name in (("decode tokens/s", "decode"), ("prefill tokens/s", "prefill")):
        fields = (getattr(summary, f"{name}_tps_{side}") for side in ("dense", "compressed"))
        table.add_row(label, *(f"{v:.1f}" for v in fields), f"{getattr(summary, f'{name}_ratio'):.2f}")
    table.add_section()
    table.add_row("seconds to compress", "", f"{summary.compress_seconds:.0f}", "")
    table.add_row("seconds in all", "", f"{summary.seconds:.0f}", "")
    return table
