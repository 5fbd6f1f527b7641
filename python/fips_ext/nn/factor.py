"""One sparse slice as a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..layout import BlockSparse, Encoding, check_block, grid_shape, unpack_bits
from ..quantise import CODE_DTYPES, SCALE_DTYPE, Bits, choose_scales, straight_through


class Rounding(NamedTuple):
    """How values will become codes."""

    bits: Bits
    scales: Tensor


class FloatValues(NamedTuple):
    """What a slice had before it had codes."""

    values: nn.Parameter
    block_ptr: Tensor | None
    rounding: Rounding


_DERIVED = ("row_ptr", "col_idx", "block_id", "block_ptr")


class SparseFactor(nn.Module):
    """A :class:`BlockSparse` slice: ``values`` is the parameter, the index is buffers.

    What a checkpoint needs (``values, col_ptr, row_idx, mask, scales``) is in the ``state_dict``; the
    transposed index and the value offsets are derived again after loading.

    Codes are a buffer: values are trained, after :meth:`round_to` through the rounding with the gradient of
    the identity, and become codes by :meth:`quantise`.
    """

    def __init__(self, slice_: BlockSparse) -> None:
        super().__init__()
        self.rows, self.cols, self.block = slice_.rows, slice_.cols, slice_.block
        self.rounding: Rounding | None = None
        if slice_.bits is None:
            self.values = nn.Parameter(slice_.values)
        else:
            self.register_buffer("values", slice_.values)
        self.register_buffer("col_ptr", slice_.col_ptr)
        self.register_buffer("row_idx", slice_.row_idx)
        self.register_buffer("mask", slice_.mask)
        self.register_buffer("scales", slice_.scales)
        for name in _DERIVED:
            self.register_buffer(name, getattr(slice_, name), persistent=False)
        self.register_load_state_dict_post_hook(_derive_index)

    @classmethod
    def empty(
        cls,
        rows: int,
        cols: int,
        block: tuple[int, int],
        encoding: Encoding,
        num_blocks: int,
        num_values: int,
        dtype: torch.dtype | None = None,
        bits: Bits | None = None,
    ) -> SparseFactor:
        """A slice of known sizes with undefined content, to be filled by ``load_state_dict``.

        Args:
            num_values: elements of ``values``; of codes of 4 bits, half of the codes.
        """
        bk, bn = check_block(block)
        nbk, nbn = grid_shape(rows, cols, block)
        int32 = torch.int32
        bitmap = encoding == "bitmap"
        shape = (num_values,) if bitmap else (num_blocks, bn, bk // 2 if bits == 4 else bk)
        dtype = dtype if bits is None else CODE_DTYPES[bits]
        return cls(
            BlockSparse(
                rows,
                cols,
                (bk, bn),
                torch.empty(shape, dtype=dtype),
                torch.empty(nbn + 1, dtype=int32),
                torch.empty(num_blocks, dtype=int32),
                torch.empty(nbk + 1, dtype=int32),
                torch.empty(num_blocks, dtype=int32),
                torch.empty(num_blocks, dtype=int32),
                torch.empty(num_blocks, bn, bk // 8, dtype=torch.uint8) if bitmap else None,
                torch.empty(num_blocks + 1, dtype=int32) if bitmap else None,
                None if bits is None else torch.empty(num_blocks, bn, dtype=SCALE_DTYPE),
            )
        )

    def slice(self, values: Tensor | None = None) -> BlockSparse:
        """The slice over ``values`` (default: the parameter)."""
        return BlockSparse(
            self.rows,
            self.cols,
            self.block,
            self.values if values is None else values,
            self.col_ptr,
            self.row_idx,
            self.row_ptr,
            self.col_idx,
            self.block_id,
            self.mask,
            self.block_ptr,
            self.scales,
        )

    @property
    def bits(self) -> Bits | None:
        """Of a code; None where the slice holds values."""
        return self.slice().bits

    def round_to(self, bits: Bits, scales: Tensor | None = None) -> None:
        """From now on compute with what :meth:`quantise` will make of the values.

        Args:
            scales: float16 ``[nnzb, bn]``; default those of least error for the present values. They stay
                as they are, however the values are trained.
        """
        if bits not in CODE_DTYPES or self.bits is not None:
            raise InvalidArgument(
                f"bits: got {bits!r} for a slice of {self.bits or 'no'} bits; only values can be rounded, to "
                f"codes of {' or '.join(map(str, CODE_DTYPES))} bits"
            )
        if scales is None:
            scales = choose_scales(self.slice(self.values.detach()).tiles(), bits)
        self.rounding = Rounding(bits, scales)

    def rounded_values(self) -> Tensor:
        """The values, or after :meth:`round_to` what quantising makes of them; differentiable."""
        if self.rounding is None:
            return self.values
        rows = straight_through(self.slice().tiles(), self.rounding.scales, self.rounding.bits)
        return rows if self.mask is None else rows[unpack_bits(self.mask)]

    def quantise(self) -> FloatValues:
        """Replace the values by codes, as :meth:`round_to` said; returns what :meth:`restore` takes."""
        if self.rounding is None:
            raise InvalidArgument("quantise: the slice has no scales yet; call round_to(bits) first")
        before = FloatValues(self.values, self.block_ptr, self.rounding)
        codes = self.slice(self.values.detach()).quantised(*self.rounding)
        del self.values
        self.register_buffer("values", codes.values)
        self.block_ptr, self.scales, self.rounding = codes.block_ptr, codes.scales, None
        return before

    def restore(self, before: FloatValues) -> None:
        """Undo :meth:`quantise`."""
        del self.values
        self.values, self.block_ptr, self.rounding = before
        self.scales = None

    def _apply(self, fn, recurse: bool = True) -> SparseFactor:
        """Moves everything, but casts no scales: their type is part of the format."""
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self.rounding is not None:
            self.rounding = self.rounding._replace(scales=self.rounding.scales.to(self.values.device))
        return self

    def tensors(self) -> list[Tensor]:
        """What the ops take of this slice: ``slice().tensors()``, without the way through attributes.

        A module's attribute look-up costs as much as a small kernel; decoding passes here per token.
        """
        b = self._buffers
        if b["scales"] is not None:
            values = b["values"]
        else:
            values = self._parameters["values"] if self.rounding is None else self.rounded_values()
        found = [values, b["col_ptr"], b["row_idx"], b["row_ptr"], b["col_idx"], b["block_id"]]
        if b["mask"] is not None:
            found += [b["mask"], b["block_ptr"]]
        if b["scales"] is not None:
            found.append(b["scales"])
        return found

    def derive_index(self) -> None:
        """Recompute the derived buffers from ``col_ptr``, ``row_idx`` and ``mask``, validating them."""
        try:
            full = BlockSparse.from_index(
                self.rows,
                self.cols,
                self.block,
                self.values.detach(),
                self.col_ptr,
                self.row_idx,
                self.mask,
                self.scales,
            )
        except InvalidArgument as error:
            raise InvalidArgument(f"loaded sparse slice is inconsistent: {error}") from error
        for name in _DERIVED:
            setattr(self, name, getattr(full, name))

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense ``[r, n]``; ``dtype``: of what codes stand for, default float32."""
        return self.slice(self.rounded_values()).to_dense(dtype)

    def extra_repr(self) -> str:
        full = self.slice()
        return (
            f"rows={self.rows}, cols={self.cols}, block={self.block}, encoding={full.encoding}, "
            f"density={full.density:.3f}" + ("" if full.bits is None else f", bits={full.bits}")
        )


def _derive_index(module: SparseFactor, _incompatible_keys) -> None:
    # Some loaders bring one tensor at a time.
    if not any(tensor.is_meta for tensor in module.state_dict().values()):
        module.derive_index()
