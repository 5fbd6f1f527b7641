"""Compress a model that fips_ext has never heard of: MLPs are found by their structure.

    python examples/plain_pytorch.py

Weights and data are random, so the error is that of the worst case: there is nothing to share.
"""

import tempfile

import torch
from torch import Tensor, nn

import fips_ext
from fips_ext import compress
from fips_ext.checkpoint import from_pretrained, info, save_pretrained

WIDTH, HIDDEN, BLOCKS = 64, 256, 4


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def build() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).eval()


def main() -> None:
    torch.manual_seed(0)
    model = build()
    data = [torch.randn(8, 64, WIDTH) for _ in range(8)]  # any inputs the model takes
    held_out = torch.randn(8, 64, WIDTH)
    with torch.no_grad():
        dense = model(held_out)

    recipe = fips_ext.Recipe(ratio=0.6, pattern="bitmap:16x64", calibration_tokens=4096, steps=50)
    report = compress(model, recipe, data)
    with torch.no_grad():
        compressed = model(held_out)
    print(report.to_markdown())
    print(f"relative error of the outputs: {float((compressed - dense).norm() / dense.norm()):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, recipe=recipe, report=report)
        # transformers has no class for this model, so a freshly built one says what it looks like.
        loaded = from_pretrained(folder, model=build())
        print(f"MLP bytes over dense: {info(folder)['ratios']['mlp']:.3f}")
    with torch.no_grad():
        print("reloaded outputs are equal:", torch.equal(loaded(held_out), compressed))


if __name__ == "__main__":
    main()
