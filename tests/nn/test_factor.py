"""SparseFactor and SharedBase: what they register, save and derive."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fips_ext.errors import InvalidArgument
from fips_ext.layout import BlockSparse, Encoding
from fips_ext.nn import SharedBase, SparseFactor

pytestmark = pytest.mark.usefixtures("single_thread")

ENCODINGS = ("block", "bitmap")


def sparse(rows: int = 40, cols: int = 70, encoding: Encoding = "block") -> tuple[torch.Tensor, SparseFactor]:
    dense = torch.randn(rows, cols) * (torch.rand(rows, cols) < 0.1)
    dense[:16, :32] = 0  # at least one absent block
    return dense, SparseFactor(BlockSparse.from_dense(dense, (16, 32), encoding))


def empty_like(factor: SparseFactor) -> SparseFactor:
    layout = factor.slice()
    return SparseFactor.empty(
        layout.rows,
        layout.cols,
        layout.block,
        layout.encoding,
        layout.num_blocks,
        layout.values.numel(),
        bits=layout.bits,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_it_is_the_dense_slice(encoding: Encoding) -> None:
    dense, factor = sparse(encoding=encoding)
    assert torch.equal(factor.to_dense(), dense)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_state_holds_what_a_checkpoint_needs(encoding: Encoding) -> None:
    _, factor = sparse(encoding=encoding)
    stored = {"values", "col_ptr", "row_idx"} | ({"mask"} if encoding == "bitmap" else set())
    assert set(factor.state_dict()) == stored
    assert [name for name, _ in factor.named_parameters()] == ["values"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loading_derives_the_rest(encoding: Encoding, assign: bool) -> None:
    dense, factor = sparse(encoding=encoding)
    loaded = empty_like(factor)
    loaded.load_state_dict(factor.state_dict(), assign=assign)
    assert torch.equal(loaded.to_dense(), dense)
    for mine, theirs in zip(loaded.slice().tensors(), factor.slice().tensors(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loading_from_the_meta_device(encoding: Encoding) -> None:
    dense, factor = sparse(encoding=encoding)
    with torch.device("meta"):
        loaded = empty_like(factor)
    loaded.load_state_dict(factor.state_dict(), assign=True)
    assert torch.equal(loaded.to_dense(), dense)
    assert not any(t.is_meta for t in loaded.slice().tensors())
    assert isinstance(loaded.values, torch.nn.Parameter)
    assert loaded.values.requires_grad


def test_loading_checks_the_index() -> None:
    _, factor = sparse()
    state = factor.state_dict()
    state["row_idx"] = torch.full_like(state["row_idx"], 3)
    with pytest.raises(InvalidArgument, match="loaded sparse slice is inconsistent: row_idx"):
        empty_like(factor).load_state_dict(state)


def test_a_cast_leaves_the_index() -> None:
    dense, factor = sparse(encoding="bitmap")
    factor.to(torch.bfloat16)
    values, *index = factor.slice().tensors()
    assert values.dtype == torch.bfloat16
    assert {t.dtype for t in index} == {torch.int32, torch.uint8}
    assert torch.equal(factor.to_dense(), dense.bfloat16())


def test_the_rows_of_a_base() -> None:
    assert SharedBase(torch.zeros(32, 8)).rows == 8
    assert SharedBase(torch.zeros(32, 8), identity=True).rows == 40
    plain = SharedBase.empty(32, 0, identity=True, dtype=torch.float16)
    assert (plain.rows, plain.rank, plain.width, plain.weight.dtype) == (32, 0, 32, torch.float16)


def test_the_repr_says_the_sizes() -> None:
    _, factor = sparse(encoding="bitmap")
    assert "rows=40, cols=70, block=(16, 32), encoding=bitmap" in repr(factor)
    assert "width=32, rank=8, identity=True" in repr(SharedBase(torch.zeros(32, 8), identity=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_survive_saving_casting_copying(encoding: Encoding, bits: int) -> None:
    _, factor = sparse(encoding=encoding)
    factor.round_to(bits)
    expected = factor.slice(factor.rounded_values().detach()).to_dense()
    factor.quantise()
    assert factor.bits == bits
    assert not list(factor.parameters())
    with pytest.raises(InvalidArgument, match="only values can be rounded"):
        factor.round_to(bits)
    assert torch.equal(factor.to_dense(), expected)
    stored = {"values", "col_ptr", "row_idx", "scales"} | ({"mask"} if encoding == "bitmap" else set())
    assert set(factor.state_dict()) == stored
    loaded = empty_like(factor)
    loaded.load_state_dict(factor.state_dict())
    for other in (loaded, copy.deepcopy(factor), pickle.loads(pickle.dumps(factor))):
        for cast in (torch.float64, torch.bfloat16):
            other.to(cast)
            assert other.scales.dtype == torch.float16
            assert torch.equal(other.to_dense(), expected)
    assert f"bits={bits}" in repr(factor)


def test_damaged_codes_are_refused() -> None:
    _, factor = sparse(encoding="bitmap")
    factor.round_to(8)
    factor.quantise()
    state = factor.state_dict()
    state["scales"] = torch.full_like(state["scales"], torch.inf)
    with pytest.raises(InvalidArgument, match="scales: hold NaN, Inf or negative"):
        copy.deepcopy(factor).load_state_dict(state)


def test_misuse_says_what_to_do() -> None:
    _, factor = sparse()
    with pytest.raises(InvalidArgument, match=r"call round_to\(bits\) first"):
        factor.quantise()
    with pytest.raises(InvalidArgument, match="codes of 8 or 4 bits"):
        factor.round_to(3)
    with pytest.raises(InvalidArgument, match="codes of 8 or 4 bits"):
        factor.slice(factor.values.detach()).quantised(2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_training_passes_through_the_rounding(encoding: Encoding) -> None:
    """Products see the rounded values, gradients reach the exact ones as if nothing were rounded."""
    _, factor = sparse(encoding=encoding)
    plain = copy.deepcopy(factor)
    factor.round_to(4)
    x = torch.randn(3, factor.rows)
    grads = []
    for module in (factor, plain):
        v = module.tensors()
        y = torch.ops.fips.block_sparse_mm(x, v, module.rows, module.cols, False, None)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        grads.append(module.values.grad)
        last = y.detach()
    assert torch.equal(*grads)
    before = factor.values.detach().clone()
    undo = factor.quantise()
    codes = torch.ops.fips.block_sparse_mm(x, factor.tensors(), factor.rows, factor.cols, False, None)
    assert not torch.equal(codes, last)
    factor.restore(undo)
    assert factor.scales is None
    assert torch.equal(factor.values, before)
    rounded = torch.ops.fips.block_sparse_mm(x, factor.tensors(), factor.rows, factor.cols, False, None)
    torch.testing.assert_close(rounded, codes)
    torch.testing.assert_close(x @ factor.to_dense(), codes)
