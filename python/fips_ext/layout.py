"""The block-sparse layout of one factor slice ``V_i`` (see docs/format.md).

A slice has shape ``(rows, cols) = (r, n)``: rows are base vectors, columns are hidden neurons. It is cut
into a grid of ``bk × bn`` blocks, each absent or stored, indexed by block column (BCSC). Ragged edges are
padded with zeros. Two encodings share the index:

``block``   every slot of a stored block is stored: ``values [nnzb, bn, bk]``, k contiguous.
``bitmap``  one bit per slot of a stored block and the non-zeros packed in slot order:
            ``mask uint8 [nnzb, bn, bk / 8]`` (bit ``k % 8`` of byte ``k / 8``), ``values [nnz]``,
            ``block_ptr int32 [nnzb + 1]``.

Either may hold codes of 8 or 4 bits instead of values, and a scale per row of a block
(:mod:`fips_ext.quantise`).

A layout is immutable; the values are the parameter.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from . import quantise
from .errors import InvalidArgument

Encoding = Literal["block", "bitmap"]
BLOCK_SIZES = (16, 32, 64, 128)
_INT32_MAX = 2**31 - 1


def check_block(block: tuple[int, int]) -> tuple[int, int]:
    """Return ``block`` if both edges are allowed, else raise ``InvalidArgument``."""
    if len(block) != 2 or any(edge not in BLOCK_SIZES for edge in block):
        raise InvalidArgument(
            f"block: got {tuple(block)}; each edge of (bk, bn) must be one of {BLOCK_SIZES}"
        )
    return int(block[0]), int(block[1])


def grid_shape(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    """Number of block rows and block columns of a ``rows × cols`` slice."""
    return -(-rows // block[0]), -(-cols // block[1])


def to_blocks(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """View a dense ``[rows, cols]`` matrix as ``[block cols, block rows, bn, bk]``, zero-padded."""
    bk, bn = block
    rows, cols = dense.shape
    nbk, nbn = grid_shape(rows, cols, block)
    padded = dense.new_zeros(nbk * bk, nbn * bn)
    padded[:rows, :cols] = dense
    return padded.view(nbk, bk, nbn, bn).permute(2, 0, 3, 1)


def from_blocks(blocks: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of :func:`to_blocks`; the padding is cut off."""
    nbn, nbk, bn, bk = blocks.shape
    return blocks.permute(1, 3, 0, 2).reshape(nbk * bk, nbn * bn)[:rows, :cols]


def pack_bits(bits: Tensor) -> Tensor:
    """Pack a bool tensor ``[..., bk]`` into ``uint8 [..., bk / 8]``, least significant bit first."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    grouped = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8).to(torch.uint8)
    return (grouped * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8).bool()


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparse:
    """One factor slice ``V_i``. Build it with :meth:`from_dense`; pass :meth:`tensors` to the ops.

    Attributes:
        rows, cols: logical shape ``(r, n)``.
        block: ``(bk, bn)``, each edge one of 16, 32, 64, 128.
        values: ``[nnzb, bn, bk]`` (``block``) or ``[nnz]`` (``bitmap``), any floating dtype; or codes, see
            :func:`fips_ext.quantise.pack_codes`.
        col_ptr: int32 ``[block cols + 1]``, first stored block of each block column.
        row_idx: int32 ``[nnzb]``, block row of each stored block, increasing inside a column.
        row_ptr, col_idx, block_id: the transposed index, int32 ``[block rows + 1]``, ``[nnzb]``, ``[nnzb]``.
        mask, block_ptr: ``bitmap`` only, see the module docstring.
        scales: of codes only: float16 ``[nnzb, bn]``.
    """

    rows: int
    cols: int
    block: tuple[int, int]
    values: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    block_id: Tensor
    mask: Tensor | None = None
    block_ptr: Tensor | None = None
    scales: Tensor | None = None

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        block: tuple[int, int] = (64, 64),
        encoding: Encoding = "block",
        mask: Tensor | None = None,
    ) -> BlockSparse:
        """Pack the kept entries of ``dense [r, n]``.

        Args:
            mask: bool ``[r, n]``, the slots to keep; default ``dense != 0``. For ``block`` a block is
                stored when any of its slots is kept (and then whole). For ``bitmap`` kept zeros stay stored.
        """
        block = check_block(block)
        if dense.dim() != 2 or not dense.is_floating_point():
            raise InvalidArgument(
                f"dense: expected a floating [r, n] matrix, got {dense.dtype} {tuple(dense.shape)}"
            )
        keep = dense != 0 if mask is None else mask
        if keep.shape != dense.shape or keep.dtype != torch.bool:
            raise InvalidArgument(
                f"mask: expected bool {tuple(dense.shape)}, got {keep.dtype} {tuple(keep.shape)}"
            )
        rows, cols = dense.shape
        keep_blocks = to_blocks(keep, block)
        stored = keep_blocks.flatten(2).any(-1)  # [block cols, block rows]
        col_ptr, row_idx = index_of(stored)
        value_blocks = to_blocks(dense, block)[stored]  # column-major block order
        if encoding == "block":
            return cls.from_index(rows, cols, block, value_blocks.contiguous(), col_ptr, row_idx)
        if encoding == "bitmap":
            bits = keep_blocks[stored]
            values = value_blocks[bits].contiguous()
            return cls.from_index(rows, cols, block, values, col_ptr, row_idx, pack_bits(bits))
        raise InvalidArgument(f"encoding: got {encoding!r}; allowed are 'block' and 'bitmap'")

    @classmethod
    def from_index(
        cls,
        rows: int,
        cols: int,
        block: tuple[int, int],
        values: Tensor,
        col_ptr: Tensor,
        row_idx: Tensor,
        mask: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> BlockSparse:
        """Complete a slice from what a checkpoint stores; validates every index."""
        nbk, nbn = grid_shape(rows, cols, check_block(block))
        _check_index(col_ptr, row_idx, nbk, nbn)
        row_ptr, col_idx, block_id = transpose_index(col_ptr, row_idx, nbk)
        nnzb = row_idx.numel()
        bits = _check_scales(values, scales, (nnzb, block[1]))
        block_ptr = None
        if mask is None:
            expected = (nnzb, block[1], block[0] // (2 if bits == 4 else 1))
        else:
            if mask.dtype != torch.uint8 or mask.shape != (nnzb, block[1], block[0] // 8):
                raise InvalidArgument(
                    f"mask: expected uint8 {(nnzb, block[1], block[0] // 8)}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            block_ptr = block_ptr_of(mask, bits)
            expected = (int(block_ptr[-1]) // (2 if bits == 4 else 1),)
        if tuple(values.shape) != expected:
            raise InvalidArgument(f"values: expected shape {expected}, got {tuple(values.shape)}")
        if mask is not None:
            slots = unpack_bits(mask)
        else:
            slots = values if bits is None else quantise.unpack_codes(values)
        _check_padding(rows, cols, block, col_ptr, row_idx, slots)
        index = (col_ptr, row_idx, row_ptr, col_idx, block_id)
        return cls(rows, cols, block, values, *index, mask, block_ptr, scales)

    def quantised(self, bits: quantise.Bits, scales: Tensor | None = None) -> BlockSparse:
        """The same slice with its values as codes; ``scales`` float16 ``[nnzb, bn]``, default the best."""
        if bits not in quantise.CODE_DTYPES or self.bits is not None:
            raise InvalidArgument(
                f"bits: got {bits!r} for a slice of {self.bits or 'no'} bits; only values can be quantised, "
                f"to codes of {' or '.join(map(str, quantise.CODE_DTYPES))} bits"
            )
        tiles = self.tiles()
        if scales is None:
            scales = quantise.choose_scales(tiles, bits)
        codes = quantise.encode(tiles, scales, bits)
        kept = None if self.mask is None else unpack_bits(self.mask)
        return dataclasses.replace(
            self,
            values=quantise.pack_codes(codes, bits, kept),
            block_ptr=None if self.mask is None else block_ptr_of(self.mask, bits),
            scales=scales,
        )

    def dequantised(self, dtype: torch.dtype = torch.float32) -> BlockSparse:
        """The same slice with values in place of codes; itself if it has values."""
        if self.bits is None:
            return self
        tiles = self.tiles(dtype)
        return dataclasses.replace(
            self,
            values=tiles if self.mask is None else tiles[unpack_bits(self.mask)],
            block_ptr=None if self.mask is None else block_ptr_of(self.mask),
            scales=None,
        )

    def with_values(self, values: Tensor) -> BlockSparse:
        """The same layout over other values (of the same shape)."""
        if values.shape != self.values.shape:
            raise InvalidArgument(
                f"values: expected shape {tuple(self.values.shape)}, got {tuple(values.shape)}"
            )
        return dataclasses.replace(self, values=values)

    def block_columns(self, start: int, stop: int) -> BlockSparse:
        """A slice of its own of the block columns ``[start, stop)``."""
        nbn = grid_shape(self.rows, self.cols, self.block)[1]
        if not 0 <= start < stop <= nbn:
            raise InvalidArgument(
                f"start, stop: got {start} and {stop}; expected a run of the {nbn} block columns"
            )
        first, last = int(self.col_ptr[start]), int(self.col_ptr[stop])
        values = slice(first, last)
        if self.mask is not None:
            codes = 2 if self.bits == 4 else 1
            values = slice(int(self.block_ptr[first]) // codes, int(self.block_ptr[last]) // codes)
        return BlockSparse.from_index(
            self.rows,
            min(stop * self.block[1], self.cols) - start * self.block[1],
            self.block,
            self.values[values].clone(),
            (self.col_ptr[start : stop + 1] - first).contiguous(),
            self.row_idx[first:last].clone(),
            None if self.mask is None else self.mask[first:last].clone(),
            None if self.scales is None else self.scales[first:last].clone(),
        )

    # -- views ----------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The tensors of this slice in the order that every ``torch.ops.fips`` op expects."""
        optional = [self.mask, self.block_ptr, self.scales]
        index = [self.col_ptr, self.row_idx, self.row_ptr, self.col_idx, self.block_id]
        return [self.values, *index, *[t for t in optional if t is not None]]

    def tiles(self, dtype: torch.dtype | None = None) -> Tensor:
        """Stored blocks ``[nnzb, bn, bk]`` with zeros where nothing is stored; ``dtype``: of codes."""
        kept = None if self.mask is None else unpack_bits(self.mask)
        if self.bits is not None:
            codes = quantise.unpack_codes(self.values, kept, self.block_ptr)
            return quantise.decode(codes, self.scales, dtype or torch.float32)
        if kept is None:
            return self.values
        return self.values.new_zeros(kept.shape).masked_scatter(kept, self.values)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[r, n]``, differentiable in the values.

        Args:
            dtype: of what codes stand for, default float32; values keep theirs.
        """
        bk, bn = self.block
        nbk, nbn = grid_shape(self.rows, self.cols, self.block)
        column = torch.repeat_interleave(
            torch.arange(nbn, device=self.col_ptr.device), self.col_ptr.diff().long()
        )
        slot = column * nbk + self.row_idx.long()
        tiles = self.tiles(dtype)
        grid = tiles.new_zeros(nbn * nbk, bn, bk).index_copy(0, slot, tiles)
        return from_blocks(grid.view(nbn, nbk, bn, bk), self.rows, self.cols)

    @property
    def encoding(self) -> Encoding:
        return "block" if self.mask is None else "bitmap"

    @property
    def bits(self) -> quantise.Bits | None:
        """Of a code; None where the slice holds values."""
        return None if self.scales is None else quantise.bits_of(self.values)

    @property
    def num_blocks(self) -> int:
        return self.row_idx.numel()

    @property
    def density(self) -> float:
        """Stored values (padding included) over ``r · n``."""
        codes = 2 if self.bits == 4 else 1
        return codes * self.values.numel() / max(1, self.rows * self.cols)

    def nbytes(self) -> int:
        """Bytes of what a checkpoint stores: values, column index, mask and scales."""
        stored = [self.values, self.col_ptr, self.row_idx, self.mask, self.scales]
        return sum(t.numel() * t.element_size() for t in stored if t is not None)


def blocks_of_codes(v: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a slice of codes as those of one of values, every slot of its blocks stored."""
    values, *index, scales = v
    bitmap = index[5:]
    kept = (unpack_bits(bitmap[0]), bitmap[1]) if bitmap else ()
    return [quantise.decode(quantise.unpack_codes(values, *kept), scales, dtype), *index[:5]]


def index_of(stored: Tensor) -> tuple[Tensor, Tensor]:
    """``(col_ptr, row_idx)`` of a bool block grid ``[block cols, block rows]``."""
    counts = stored.sum(1)
    col_ptr = torch.zeros(stored.shape[0] + 1, dtype=torch.int32, device=stored.device)
    col_ptr[1:] = counts.cumsum(0)
    return col_ptr, stored.nonzero()[:, 1].to(torch.int32).contiguous()


def transpose_index(col_ptr: Tensor, row_idx: Tensor, nbk: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(row_ptr, col_idx, block_id)``: the stored blocks by block row, columns increasing."""
    nbn = col_ptr.numel() - 1
    column = torch.repeat_interleave(torch.arange(nbn, device=col_ptr.device), col_ptr.diff().long())
    block_id = torch.argsort(row_idx.long(), stable=True)
    row_ptr = torch.zeros(nbk + 1, dtype=torch.int32, device=col_ptr.device)
    row_ptr[1:] = torch.bincount(row_idx.long(), minlength=nbk).cumsum(0)
    return row_ptr, column[block_id].to(torch.int32), block_id.to(torch.int32)


def block_ptr_of(mask: Tensor, bits: quantise.Bits | None = None) -> Tensor:
    """First packed value (or code of so many bits) of each stored block, int32 ``[nnzb + 1]``."""
    counts = unpack_bits(mask).flatten(1).sum(1) if mask.numel() else mask.new_zeros(mask.shape[0]).long()
    first, total = quantise.code_offsets(counts, bits)
    if total > _INT32_MAX:
        raise InvalidArgument(
            f"values: a slice holds {total} values, at most {_INT32_MAX} are allowed; "
            "split the slice or raise the sparsity"
        )
    return torch.cat([first, first.new_full((1,), total)]).to(torch.int32)


def _check_scales(values: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> quantise.Bits | None:
    """The bits of the codes, or None."""
    if scales is None:
        if not values.is_floating_point():
            raise InvalidArgument(f"values: {values.dtype} are codes; pass their scales, float16 {shape}")
        return None
    bits = quantise.bits_of(values)
    if bits is None:
        raise InvalidArgument(
            f"values: {values.dtype} are no codes; with scales they are int8, or uint8 for codes of 4 bits"
        )
    if scales.dtype != quantise.SCALE_DTYPE or tuple(scales.shape) != shape:
        raise InvalidArgument(f"scales: expected float16 {shape}, got {scales.dtype} {tuple(scales.shape)}")
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise InvalidArgument("scales: hold NaN, Inf or negative numbers")
    return bits


def _check_padding(
    rows: int, cols: int, block: tuple[int, int], col_ptr: Tensor, row_idx: Tensor, slots: Tensor
) -> None:
    """Slots past a ragged edge must be zero (not stored, in a bitmap): kernels multiply them."""
    bk, bn = block
    nbk, nbn = grid_shape(rows, cols, block)
    last_row = slots[row_idx == nbk - 1][:, :, bk - (nbk * bk - rows) :] if rows % bk else slots[:0]
    last_col = slots[int(col_ptr[-2]) :][:, bn - (nbn * bn - cols) :] if cols % bn else slots[:0]
    if bool((last_row != 0).any()) or bool((last_col != 0).any()):
        raise InvalidArgument(
            f"values: slots in the padding of a {rows} × {cols} slice in {bk}×{bn} blocks must be zero"
        )


def _check_index(col_ptr: Tensor, row_idx: Tensor, nbk: int, nbn: int) -> None:
    for name, index in (("col_ptr", col_ptr), ("row_idx", row_idx)):
        if index.dtype != torch.int32 or index.dim() != 1:
            raise InvalidArgument(
                f"{name}: expected a 1-D int32 tensor, got {index.dtype} {tuple(index.shape)}"
            )
    if col_ptr.numel() != nbn + 1:
        raise InvalidArgument(f"col_ptr: expected {nbn + 1} entries, got {col_ptr.numel()}")
    steps = col_ptr.diff()
    if int(col_ptr[0]) != 0 or bool((steps < 0).any()) or int(col_ptr[-1]) != row_idx.numel():
        raise InvalidArgument(f"col_ptr: must rise from 0 to the number of stored blocks ({row_idx.numel()})")
    if row_idx.numel() == 0:
        return
    if bool((row_idx < 0).any()) or bool((row_idx >= nbk).any()):
        raise InvalidArgument(
            f"row_idx: entries must lie in [0, {nbk}), got [{int(row_idx.min())}, {int(row_idx.max())}]"
        )
    column = torch.repeat_interleave(torch.arange(nbn, device=col_ptr.device), col_ptr.diff().long())
    order = column * nbk + row_idx.long()
    if bool((order.diff() <= 0).any()):
        raise InvalidArgument("row_idx: must increase strictly inside each block column")
