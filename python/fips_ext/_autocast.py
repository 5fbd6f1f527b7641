"""Autocast: the products run in the autocast dtype, like ``torch.nn.functional.linear``."""

from __future__ import annotations

import torch
from torch import Tensor

# Ops whose arguments are cast, with the positions of those that keep their type (token_weight is float32).
_CAST = {
    "block_sparse_mm": (),
    "block_sparse_sddmm": (),
    "shared_mlp": (),
    "reconstruction_loss": (2,),
}
# The rest run in the types they are given. They need a rule all the same: inside an op autocast must be off,
# or the matrix products that its kernel calls would return another type than it expects.
_KEEP = ("shared_mlp_backward", "batched_rsvd", "batched_gram_eigh", "gram_update")
_library: torch.library.Library | None = None


def _cast(argument, dtype: torch.dtype):
    """Cast floating tensors (float64 stays: nobody lowers it by accident), of a slice its values only."""
    if isinstance(argument, Tensor):
        wanted = argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(dtype) if wanted else argument
    if isinstance(argument, list | tuple):
        return [*(_cast(values, dtype) for values in argument[:1]), *argument[1:]]
    return argument


def _kernel(op, keep: tuple[int, ...] | None, device_type: str, key: torch._C.DispatchKey):
    def autocast(_keyset, *args, **kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if keep is None:
                return op(*args, **kwargs)
            return op(
                *[a if i in keep else _cast(a, dtype) for i, a in enumerate(args)],
                **{name: _cast(argument, dtype) for name, argument in kwargs.items()},
            )

    return autocast


def register() -> None:
    """Register the rules on ``torch.ops.fips`` for the CPU and CUDA."""
    global _library
    _library = torch.library.Library("fips", "IMPL")
    for name, keep in (_CAST | dict.fromkeys(_KEEP)).items():
        op = getattr(torch.ops.fips, name).default
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            kernel = _kernel(op, keep, device_type, getattr(torch._C.DispatchKey, key))
            _library.impl(name, kernel, key, with_keyset=True)
