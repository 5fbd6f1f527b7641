"""Values as codes of 8 or 4 bits, one scale per row of a block (see docs/format.md).

A row is what one hidden neuron has in one block: ``bk`` slots. Its values are ``code · scale`` with the scale
in float16. Codes are symmetric, ±127 or ±7, so that a dropped slot is an exact zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .errors import NumericalError

Bits = Literal[8, 4]
SCALE_DTYPE = torch.float16
CODE_DTYPES: dict[int, torch.dtype] = {8: torch.int8, 4: torch.uint8}
LARGEST_CODE: dict[int, int] = {8: 127, 4: 7}
# Cutting off the largest value of a row makes all others finer: of these shares of it the one of least error
# is taken. With 8 bits it is hardly ever another than 1.
_CUTS: dict[int, tuple[float, ...]] = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}


def bits_of(values: Tensor) -> Bits | None:
    """Bits of the codes in ``values``; None where they are no codes."""
    return next((bits for bits, dtype in CODE_DTYPES.items() if dtype == values.dtype), None)


def choose_scales(rows: Tensor, bits: Bits) -> Tensor:
    """Scales of least squared error for rows ``[..., bk]``: float16 ``[...]``, rounded up, so that no code
    leaves its range; zero for a row of zeros.

    Raises:
        NumericalError: a value is NaN, Inf or too large for a scale in float16.
    """
    rows = rows.float()
    peak = rows.abs().amax(-1)
    largest = LARGEST_CODE[bits] * torch.finfo(SCALE_DTYPE).max
    if not bool((peak <= largest).all()):
        raise NumericalError(
            f"values: the largest is {float(peak.max()):.3g}; codes of {bits} bits reach {largest:.3g}; "
            "scale the weights, or store values"
        )
    best, least = None, None
    for cut in _CUTS[bits]:
        scales = _round_up(cut * peak / LARGEST_CODE[bits])
        error = (decode(encode(rows, scales, bits), scales) - rows).square().sum(-1)
        if best is None:
            best, least = scales, error
        else:
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def encode(rows: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The nearest codes, int8, of rows ``[..., bk]``."""
    scales = scales.float().unsqueeze(-1)
    codes = torch.where(scales > 0, rows.float() / scales, 0).round_()
    return codes.clamp_(-LARGEST_CODE[bits], LARGEST_CODE[bits]).to(torch.int8)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code · scale`` for codes ``[..., bk]``, rounded to ``dtype``."""
    return (codes.float() * scales.float().unsqueeze(-1)).to(dtype)


def pack_codes(codes: Tensor, bits: Bits, kept: Tensor | None = None) -> Tensor:
    """Codes ``[nnzb, bn, bk]`` as they are stored.

    Args:
        kept: bool like ``codes``, the slots of a bitmap; None keeps every slot.

    Returns:
        8 bits: int8, like ``codes`` or ``[nnz]``. 4 bits: uint8, two codes to a byte, the low half first,
        ``[nnzb, bn, bk / 2]`` or, every block padded to whole bytes, ``[bytes]``.
    """
    if kept is None:
        return codes if bits == 8 else _pairs(codes)
    if bits == 8:
        return codes[kept]
    counts = kept.flatten(1).sum(1)
    first, size = code_offsets(counts, bits)
    places = kept.flatten(1).cumsum(1) - 1 + first.unsqueeze(1)
    flat = codes.new_zeros(size)
    flat[places[kept.flatten(1)]] = codes[kept]
    return _pairs(flat)


def unpack_codes(values: Tensor, kept: Tensor | None = None, block_ptr: Tensor | None = None) -> Tensor:
    """Inverse of :func:`pack_codes`: int8 ``[nnzb, bn, bk]``, zero where nothing is kept.

    Args:
        kept, block_ptr: of a bitmap.
    """
    flat = values if values.dtype == torch.int8 else _halves(values)
    if kept is None:
        return flat
    # No shape here depends on what is kept, so that the op that needs this can be traced.
    places = kept.flatten(1).cumsum(1, dtype=torch.int32)
    places += block_ptr[:-1].unsqueeze(1)  # one too far: in front comes a zero
    codes = torch.cat([flat.new_zeros(1), flat])[torch.where(kept.flatten(1), places, 0)]
    return codes.view(kept.shape)


def code_offsets(counts: Tensor, bits: Bits | None) -> tuple[Tensor, int]:
    """First place of each block that keeps ``counts`` codes (or values), and how many places there are."""
    held = counts + counts % 2 if bits == 4 else counts
    return held.cumsum(0) - held, int(held.sum())


def straight_through(rows: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """What quantising makes of rows ``[..., bk]``, with the gradient of the identity (Bengio et al. 2013)."""
    with torch.no_grad():
        rounded = decode(encode(rows, scales, bits), scales, rows.dtype)
    return rows + (rounded - rows).detach()


def _pairs(codes: Tensor) -> Tensor:
    low, high = codes[..., 0::2], codes[..., 1::2]
    return ((low & 15) | (high << 4)).view(torch.uint8)


def _halves(packed: Tensor) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8)
    return (halves ^ 8) - 8


def _round_up(scales: Tensor) -> Tensor:
    rounded = scales.to(SCALE_DTYPE)
    short = rounded.float() < scales
    return torch.where(short, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
