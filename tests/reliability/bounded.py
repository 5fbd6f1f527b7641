"""Compresses random models of a given width, larger than the memory that is allowed, at two depths."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fips_ext import memory
from tests.tiny_llama import byte_tokenizer, save_text

VOCABULARY = 256


def save_random_llama(folder: Path, width: int, hidden: int, layers: int) -> None:
    """A bfloat16 Llama of a shard per layer, written without ever being whole in memory."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def save(shard: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{shard:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            scale = shape[-1] ** -0.5
            random = torch.randn(shape, generator=generator, dtype=torch.float32) * scale
            tensors[name] = (torch.ones(shape) if len(shape) == 1 else random).bfloat16()
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})

    keys = max(1, width // 512) * 128
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        save(i + 1, {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()})
    ends = {"model.embed_tokens": (VOCABULARY, width), "model.norm": (width,), "lm_head": (VOCABULARY, width)}
    save(layers + 1, {f"{name}.weight": shape for name, shape in ends.items()})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def layer_bytes(width: int, hidden: int) -> int:
    """Of one block, float32: what its master weights take."""
    attention = 2 * width * width + 2 * max(1, width // 512) * 128 * width
    return 4 * (attention + 3 * width * hidden)


def compress(model: Path, out: Path, text: Path, limit: str, *options: str) -> dict[str, float]:
    """Runs `fips compress` in a process of its own; its peak in bytes, as seen from outside, and its seconds.

    What the kernel tells when a process has ended counts what its parent had.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "fips_ext", "compress", str(model), "--out", str(out)]
    command += ["--calib", str(text), "--max-memory", limit, "--json", *options]
    peak = 0
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output) as process:
            while process.poll() is None:
                peak = max(peak, memory.peak(process.pid))
                time.sleep(0.05)
        if process.returncode != 0:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
        output.seek(0)
        report = json.load(output)["report"]
    return {
        "peak": max(peak, report["peak_memory"]),
        "seconds": time.monotonic() - start,
        "layers": len(report["layers"]),
        "mlp ratio": report["mlp_ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="empty, on a disk with room")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--depths", default="6,12")
    parser.add_argument("--limit", default="1.2GiB")
    arguments, options = parser.parse_known_args()
    save_text(arguments.folder / "text.txt")
    for depth in map(int, arguments.depths.split(",")):
        model, out = arguments.folder / f"model-{depth}", arguments.folder / f"out-{depth}"
        save_random_llama(model, arguments.width, arguments.hidden, depth)
        size = sum(path.stat().st_size for path in model.iterdir())
        measured = compress(model, out, arguments.folder / "text.txt", arguments.limit, *options)
        layer = layer_bytes(arguments.width, arguments.hidden)
        print(json.dumps({**measured, "model": size, "two layers": 2 * layer}), flush=True)


if __name__ == "__main__":
    main()
