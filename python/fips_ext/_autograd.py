"""Autograd formulas, registered on the ops themselves, so that direct callers get them too."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import blocks_of_codes

ops = torch.ops.fips


def _slice_grad(values_grad: Tensor | None, v) -> list[Tensor | None] | None:
    """The gradient of a slice argument: of its values only, the index has none."""
    return None if v is None else [values_grad, *[None] * (len(v) - 1)]


def _reduce_to(grad: Tensor, features: int) -> Tensor:
    return grad.reshape(grad.shape[:-1].numel(), features).sum(0)


# -- block_sparse_mm: linear in x, in the values and in the bias ------------------------------------------


def _mm_setup(ctx, inputs, output):
    x, v, ctx.rows, ctx.cols, ctx.transpose, bias = inputs
    ctx.num_slice = len(v)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *v)


def _mm_backward(ctx, grad):
    x, *v = ctx.saved_tensors
    needs_x, needs_v, *_, needs_bias = ctx.needs_input_grad
    shape = (ctx.rows, ctx.cols)
    grad_x = ops.block_sparse_mm(grad, v, *shape, not ctx.transpose, None) if needs_x else None
    grad_v = None
    if needs_v[0]:
        a, b = (grad, x) if ctx.transpose else (x, grad)
        grad_v = ops.block_sparse_sddmm(a, b, v, *shape)
    grad_bias = _reduce_to(grad, grad.shape[-1]) if ctx.has_bias and needs_bias else None
    return grad_x, _slice_grad(grad_v, v), None, None, None, grad_bias


# -- block_sparse_sddmm: bilinear; its gradients are products with the incoming values ---------------------


def _sddmm_setup(ctx, inputs, output):
    a, b, v, ctx.rows, ctx.cols = inputs
    ctx.save_for_backward(a, b, *v[1:])  # the values are not read


def _sddmm_backward(ctx, grad):
    a, b, *index = ctx.saved_tensors
    needs_a, needs_b, *_ = ctx.needs_input_grad
    weighted = [grad.contiguous(), *index]
    shape = (ctx.rows, ctx.cols)
    grad_a = ops.block_sparse_mm(b, weighted, *shape, True, None) if needs_a else None
    grad_b = ops.block_sparse_mm(a, weighted, *shape, False, None) if needs_b else None
    return grad_a, grad_b, [None] * len(weighted), None, None


# -- shared_mlp: saves its inputs only; the backward op recomputes z and h ---------------------------------


def _save_mlp(ctx, inputs) -> None:
    """Save ``(..., base, base_out, up, gate, down, *biases)`` flat and remember how to unflatten."""
    *leading, base, base_out, up, gate, down, up_bias, gate_bias, down_bias = inputs
    flat: list[Tensor] = []
    spec: list[int | None] = []  # per argument: number of tensors of a list, -1 for one tensor, None for None
    for argument in (*leading, base, base_out, up, gate, down, up_bias, gate_bias, down_bias):
        if argument is None:
            spec.append(None)
        elif isinstance(argument, Tensor):
            spec.append(-1)
            flat.append(argument)
        else:
            spec.append(len(argument))
            flat.extend(argument)
    ctx.spec = spec
    ctx.save_for_backward(*flat)


def _load_mlp(ctx) -> list:
    tensors = iter(ctx.saved_tensors)
    arguments: list = []
    for count in ctx.spec:
        if count is None:
            arguments.append(None)
        elif count == -1:
            arguments.append(next(tensors))
        else:
            arguments.append([next(tensors) for _ in range(count)])
    return arguments


def _mlp_setup(ctx, inputs, output):
    *tensors, ctx.hidden, ctx.activation, ctx.identity = inputs
    _save_mlp(ctx, tensors)


def _mlp_gradients(arguments, gradients):
    """Order gradients like the arguments ``base … down_bias``; None where the argument is None."""
    ordered = []
    for argument, grad in zip(arguments, gradients, strict=True):
        if argument is None:
            ordered.append(None)
        elif isinstance(argument, list):
            ordered.append(_slice_grad(grad, argument))
        else:
            ordered.append(grad)
    return ordered


def _mlp_backward(ctx, grad):
    x, *rest = _load_mlp(ctx)
    # Codes have no gradient, but what is before and beside them may.
    codes = [isinstance(t, list) and len(t) % 2 == 1 for t in rest]
    plain = [blocks_of_codes(t, x.dtype) if c else t for t, c in zip(rest, codes, strict=True)]
    gradients = ops.shared_mlp_backward(grad, x, *plain, ctx.hidden, ctx.activation, ctx.identity)
    found = [None if c else g for g, c in zip(gradients[1:], codes, strict=True)]
    return gradients[0], *_mlp_gradients(rest, found), None, None, None


# -- reconstruction_loss: the forward pass made the gradients already --------------------------------------


def _loss_setup(ctx, inputs, output):
    # x, target, token_weight and scale are data; then parameters, then hidden, activation, identity.
    parameters = inputs[4:12]
    ctx.lengths = [len(p) if isinstance(p, list | tuple) else None for p in parameters]
    ctx.absent = [p is None for p in parameters]
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad_loss, *_unused):
    if any(ctx.needs_input_grad[:3]):
        raise RuntimeError(
            "fips::reconstruction_loss gives no gradient of x, target or token_weight: detach them, or "
            "compute the loss from fips::shared_mlp"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError(
            "fips::reconstruction_loss can be differentiated once only, its gradients are made in the "
            "forward pass; for second derivatives use fips_ext.reference"
        )
    ordered = []
    for length, absent, grad in zip(ctx.lengths, ctx.absent, ctx.saved_tensors, strict=True):
        if absent or grad_loss is None:
            ordered.append(None if length is None else [None] * length)
            continue
        scaled = (grad * grad_loss).to(ctx.dtype)  # the sums are float32
        ordered.append(scaled if length is None else [scaled, *[None] * (length - 1)])
    return None, None, None, None, *ordered, None, None, None


# -- initialisation: results of decompositions are data ----------------------------------------------------


def _no_gradient(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fips::{name} has no derivative: it is meant for initialisation; call it under torch.no_grad() "
            "or on detached tensors"
        )

    return backward


# -- gram_update: changes its first argument, so autograd must see a new version of it ----------------------


def _gram_update_in_place(keyset, gram, x):
    torch.autograd.graph.increment_version(gram)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return ops.gram_update.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, gram, x)


_library: torch.library.Library | None = None


def register() -> None:
    """Register the formulas on ``torch.ops.fips``."""
    global _library
    _library = torch.library.Library("fips", "IMPL")
    _library.impl("gram_update", _gram_update_in_place, "ADInplaceOrView", with_keyset=True)
    for name, backward, setup in (
        ("block_sparse_mm", _mm_backward, _mm_setup),
        ("block_sparse_sddmm", _sddmm_backward, _sddmm_setup),
        ("shared_mlp", _mlp_backward, _mlp_setup),
        ("reconstruction_loss", _loss_backward, _loss_setup),
        ("shared_mlp_backward", _no_gradient("shared_mlp_backward"), None),
        ("batched_rsvd", _no_gradient("batched_rsvd"), None),
        ("batched_gram_eigh", _no_gradient("batched_gram_eigh"), None),
    ):
        torch.library.register_autograd(f"fips::{name}", backward, setup_context=setup)
