"""One sparse slice as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..layout import BlockSparse, Encoding, check_block, grid_shape

_DERIVED = ("row_ptr", "col_idx", "block_id", "block_ptr")


class SparseFactor(nn.Module):
    """A :class:`BlockSparse` slice: ``values`` is the parameter, the index is buffers.

    What a checkpoint needs (``values, col_ptr, row_idx, mask``) is in the ``state_dict``; the transposed
    index and the value offsets are derived again after loading.
    """

    def __init__(self, slice_: BlockSparse) -> None:
        super().__init__()
        self.rows, self.cols, self.block = slice_.rows, slice_.cols, slice_.block
        self.values = nn.Parameter(slice_.values)
        self.register_buffer("col_ptr", slice_.col_ptr)
        self.register_buffer("row_idx", slice_.row_idx)
        self.register_buffer("mask", slice_.mask)
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
    ) -> SparseFactor:
        """A slice of known sizes with undefined content, to be filled by ``load_state_dict``."""
        bk, bn = check_block(block)
        nbk, nbn = grid_shape(rows, cols, block)
        int32 = torch.int32
        bitmap = encoding == "bitmap"
        shape = (num_values,) if bitmap else (num_blocks, bn, bk)
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
        )

    def tensors(self) -> list[Tensor]:
        """What the ops take of this slice: ``slice().tensors()``, without the way through attributes.

        A module's attribute look-up costs as much as a small kernel; decoding passes here per token.
        """
        b = self._buffers
        index = [b["col_ptr"], b["row_idx"], b["row_ptr"], b["col_idx"], b["block_id"]]
        if b["mask"] is None:
            return [self._parameters["values"], *index]
        return [self._parameters["values"], *index, b["mask"], b["block_ptr"]]

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
            )
        except InvalidArgument as error:
            raise InvalidArgument(f"loaded sparse slice is inconsistent: {error}") from error
        for name in _DERIVED:
            setattr(self, name, getattr(full, name))

    def to_dense(self) -> Tensor:
        return self.slice().to_dense()

    def extra_repr(self) -> str:
        full = self.slice()
        return (
            f"rows={self.rows}, cols={self.cols}, block={self.block}, encoding={full.encoding}, "
            f"density={full.density:.3f}"
        )


def _derive_index(module: SparseFactor, _incompatible_keys) -> None:
    if module.values.device.type != "meta":
        module.derive_index()
