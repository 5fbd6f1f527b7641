"""A serving loop with random shapes, for as long as it is given: no error, and memory stays flat.

python -m tests.reliability.soak --minutes 30
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time

import torch

from fips_ext import memory
from fips_ext.nn.mlp import cache_dense

from ..tiny_llama import VOCABULARY, tiny_llama
from ..tiny_models import share

_GROWTH = 8 * 2**20
"""Bytes that memory may grow by after the first tenth of the time."""


def serve(minutes: float, seed: int = 0, every: int = 20) -> dict[str, float]:
    """Generates from prompts of random number and length; the counts, and how memory went.

    Args:
        every: so many requests memory is looked at.
    """
    generator = random.Random(seed)
    torch.manual_seed(seed)
    model = tiny_llama(max_position_embeddings=1024).eval()
    share(model)
    start = time.monotonic()
    requests = tokens = settled = 0
    most = 0
    while (passed := time.monotonic() - start) < 60 * minutes:
        batch, length, new = generator.randint(1, 8), generator.randint(1, 300), generator.randint(1, 24)
        if requests % 100 == 50:
            cache_dense(model, None if generator.random() < 0.5 else 0)
        prompt = torch.randint(0, VOCABULARY, (batch, length))
        with torch.inference_mode():
            out = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert out.shape == (batch, length + new)
        requests, tokens = requests + 1, tokens + batch * new
        if requests % every == 0:
            gc.collect()
            most = max(most, memory.resident())
            if passed < 6 * minutes or settled == 0:
                settled = most
    return {"requests": requests, "tokens": tokens, "growth": max(0, most - settled), "resident": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    found = serve(parser.parse_args().minutes)
    print(json.dumps(found))
    if found["growth"] > _GROWTH:
        raise SystemExit(f"memory grew by {found['growth'] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
