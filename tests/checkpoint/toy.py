"""A compressed model that transformers does not know, small enough to save in every test."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fips_ext.checkpoint import from_pretrained, save_pretrained

from ..tiny_models import GatedMLP, PlainMLP, Stack, share


def dense_toy() -> nn.Module:
    return Stack(PlainMLP(), GatedMLP(), PlainMLP())


def compressed_toy() -> nn.Module:
    model = dense_toy().eval()
    share(model, rank=8, per_role=True, encoding="bitmap")
    return model


def save_toy(directory: Path, **options) -> nn.Module:
    model = compressed_toy()
    save_pretrained(model, directory, **options)
    return model


def load_toy(directory: Path, **options) -> nn.Module:
    return from_pretrained(directory, model=dense_toy(), **options)
