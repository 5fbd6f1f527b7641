"""Is a compressed model sound, and do the kernels of this machine compute what they should?"""

from __future__ import annotations

import torch
from torch import nn

from . import functional, reference
from .errors import InvalidArgument, NumericalError
from .layout import BlockSparse
from .nn import SharedMLP, SparseFactor
from .nn.mlp import shared_mlps
from .train.loop import cast_arguments

# Of ``‖y − oracle‖ / ‖oracle‖``; the oracle computes in float64 from the same stored values.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOKENS = (1, 64)  # a decoding step, and more than any kernel for few tokens takes


@torch.no_grad()
def verify(model: nn.Module, seed: int = 0) -> dict[str, float]:
    """Check every ``SharedMLP`` of ``model``: its index, its numbers, and its op against the oracle.

    Args:
        model: compressed; on any device, not changed.
        seed: of the random inputs, whose entries are standard normal.

    Returns:
        per qualified name the largest ``‖y − oracle‖ / ‖oracle‖`` over one and over 64 tokens.

    Raises:
        InvalidArgument: ``model`` has no ``SharedMLP``, or the index of a slice is damaged.
        NumericalError: a stored number is NaN or Inf, or an output is further from the oracle than the dtype
            of the model explains.
    """
    layers = shared_mlps(model)
    if not layers:
        raise InvalidArgument("model: has no SharedMLP; compress it or load a fips_ext checkpoint first")
    errors = {}
    for name, layer in layers.items():
        _check_numbers(name, layer)
        for role, factor in layer.factors().items():
            _check_index(f"{name}.{role}", factor)
        errors[name] = max(_error(name, layer, tokens, seed) for tokens in _TOKENS)
    return errors


def _check_numbers(name: str, layer: SharedMLP) -> None:
    bases = {"base": layer.base, "base_out": layer.base_out}
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    tensors.update({f"{role}.weight": base.weight for role, base in bases.items() if base is not None})
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NumericalError(f"{name}: {key} holds NaN or Inf; load or compress the model again")


def _check_index(name: str, factor: SparseFactor) -> None:
    have = factor.slice()
    arguments = (have.values.detach(), have.col_ptr, have.row_idx, have.mask, have.scales)
    try:
        full = BlockSparse.from_index(have.rows, have.cols, have.block, *arguments)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}; load the checkpoint again") from error
    for field in ("row_ptr", "col_idx", "block_id", "block_ptr"):
        found, expected = getattr(have, field), getattr(full, field)
        if expected is not None and not torch.equal(found, expected):
            raise InvalidArgument(
                f"{name}: {field} does not follow from the index; load the checkpoint again"
            )


def _error(name: str, layer: SharedMLP, tokens: int, seed: int) -> float:
    weight = layer.base.weight
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.width, generator=generator).to(weight)
    y = functional.shared_mlp(x, **layer.op_arguments()).double()
    expected = reference.shared_mlp(x.double(), **cast_arguments(layer, torch.float64))
    error = float((y - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if not error <= _TOLERANCE[weight.dtype]:
        raise NumericalError(
            f"{name}: {tokens} tokens in {weight.dtype} are {error:.2g} off the oracle, allowed is "
            f"{_TOLERANCE[weight.dtype]:.2g}; report it with the output of torch.ops.fips.build_info()"
        )
    return error
