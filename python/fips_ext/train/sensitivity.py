"""How much an error inside an MLP costs at the output of the whole model.

To second order, errors ``e_t`` of one tensor raise the Kullback-Leibler divergence of the model's predictions
from what they were by ``½ Σ_t E[(g_tᵀ e_t)²]``, with ``g_t`` the gradient of the log-likelihood of an output
that the model itself predicts (its Fisher information; Amari, "Natural gradient works efficiently in
learning", 1998). What is kept of ``g``: the second moment of the gradient of an MLP's output, and the mean
square of the gradient of every pre-activation. Both are in nats per token, so that errors of all matrices of
a model can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed, memory
from ..errors import InvalidArgument, NumericalError
from ..surgery import DenseMLP
from ..surgery.linear_map import module_of, outputs_of

_CHUNK = 256  # rows of logits in float32 at a time


@dataclasses.dataclass
class Sensitivity:
    """Of one MLP: sums over its tokens per prediction of the model, float64.

    Attributes:
        output: ``Σ_t E[g_t g_tᵀ] [d, d]`` for the gradient ``g_t`` at its output.
        up, gate: ``Σ_t E[g_tj²] [n]`` for the gradient at the outputs of up and gate; ``gate`` is None for a
            plain MLP.
    """

    output: Tensor
    up: Tensor
    gate: Tensor | None


class SensitivityMeter:
    """Accumulates the :class:`Sensitivity` of every MLP over backward passes of a model.

    Args:
        mlps: of the model, in the order of its forward pass.
        seed: of the sampled predictions.
    """

    def __init__(self, mlps: list[DenseMLP], seed: int) -> None:
        self.mlps = mlps
        self.predictions = 0
        self.seen_shape: tuple[int, ...] = ()  # of the last output
        self._sees_logits = False
        device = mlps[0].up.weight.device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._sums = [
            {
                role: memory.zeros(
                    (mlp.width, mlp.width) if role == "down" else (mlp.hidden,), torch.float64, device
                )
                for role in mlp.linears()
            }
            for mlp in mlps
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, every forward pass of the model records what :meth:`backward` needs."""
        handles = []
        for mlp, sums in zip(self.mlps, self._sums, strict=True):
            handles.append(mlp.entry.register_forward_pre_hook(_start_of_graph, with_kwargs=True))
            for role, linear in mlp.linears().items():
                recorder = _recorder(sums[role], outputs_of(linear))
                handles.append(module_of(linear).register_forward_hook(recorder))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, output: Any, tokens: Tensor | None = None) -> None:
        """Add the gradients of one forward pass.

        Args:
            output: of the model: ``logits`` of classes in the last dimension, whose predictions are sampled;
                or features, whose relative squared error stands for the divergence.
            tokens: bool, which positions of the output count; None, or another shape, counts all.

        Raises:
            InvalidArgument: ``output`` holds no floating tensor.
            NumericalError: it holds NaN or Inf.
        """
        logits = getattr(output, "logits", None)
        result = output_features(output) if logits is None else logits
        self.seen_shape, self._sees_logits = tuple(result.shape), logits is not None
        if not bool(result.isfinite().all()):
            raise NumericalError(
                "model: its output on the calibration data holds NaN or Inf; check the data, or load it "
                "in bfloat16 or float32"
            )
        rows = result.detach().reshape(-1, result.shape[-1])
        gradient = torch.empty_like(rows)
        for start in range(0, rows.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            make = self._feature_gradient if logits is None else self._logit_gradient
            gradient[chunk] = make(rows[chunk].float()).to(gradient.dtype)
        if tokens is not None and tokens.shape == result.shape[:-1]:
            gradient[~tokens.flatten().to(gradient.device)] = 0
            self.predictions += int(tokens.sum())
        else:
            self.predictions += rows.shape[0]
        result.backward(gradient.view_as(result))

    def skip(self, rows: int) -> None:
        """Draw at random what :meth:`backward` draws for as many rows of the last output's kind."""
        for start in range(0, rows, _CHUNK):
            shape = min(_CHUNK, rows - start), self.seen_shape[-1]
            make = self._logit_gradient if self._sees_logits else self._feature_gradient
            make(torch.ones(shape, device=self._generator.device))

    def forget(self) -> None:
        """What was seen so far."""
        self.predictions = 0
        for sums in self._sums:
            for total in sums.values():
                total.zero_()

    def join(self) -> None:
        """Add up what all processes have seen."""
        if distributed.size() == 1:
            return
        count = torch.tensor([self.predictions])
        distributed.add_up([count])
        self.predictions = int(count)
        for sums in self._sums:
            distributed.add_up(sums.values())
            memory.relax()

    def result(self) -> list[Sensitivity]:
        """What has been seen so far, at least one backward pass."""
        found = []
        for sums in self._sums:
            mean = {role: memory.keep(total / self.predictions) for role, total in sums.items()}
            found.append(Sensitivity(mean["down"], mean["up"], mean.get("gate")))
            memory.relax()
        return found

    def _logit_gradient(self, logits: Tensor) -> Tensor:
        """Of the log-likelihood of a class drawn from the softmax: onehot minus probabilities."""
        probabilities = logits.softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return probabilities.neg_().scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=logits.dtype))

    def _feature_gradient(self, features: Tensor) -> Tensor:
        """A probe whose second moment is that of ``½ ‖f − f₀‖² / ‖f₀‖²``."""
        noise = torch.randn(features.shape, generator=self._generator, device=features.device)
        return noise / features.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)


class _Logits(NamedTuple):
    logits: Tensor


def named_output(model: nn.Module, output: Any) -> Any:
    """``output``, as ``logits`` where it is the bare ``[B, num_classes]`` of a classifier (timm's)."""
    classes = getattr(model, "num_classes", None)
    bare = isinstance(output, Tensor) and output.dim() == 2 and classes == output.shape[1]
    return _Logits(output) if bare else output


def output_features(output: Any) -> Tensor:
    """The last hidden state, or the first floating tensor of an output."""
    found = getattr(output, "last_hidden_state", output)
    while not isinstance(found, Tensor):
        items = found.values() if isinstance(found, Mapping) else found
        floating = [item for item in items if not isinstance(item, Tensor) or item.is_floating_point()]
        if not floating:
            raise InvalidArgument(
                "model: its output holds no floating tensor; sensitivity='output' needs none"
            )
        found = floating[0]
    return found


def _start_of_graph(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Make the input of the first MLP require a gradient, so that every later tensor has one."""
    if args:
        args = (_requiring_gradient(args[0]), *args[1:])
    else:
        name = next(iter(kwargs))
        kwargs = {**kwargs, name: _requiring_gradient(kwargs[name])}
    return args, kwargs


def _requiring_gradient(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def _recorder(total: Tensor, outputs: slice):
    """A forward hook that adds the second moments of the gradient of a part of its output to ``total``."""

    def record(gradient: Tensor) -> None:
        gradient = gradient[..., outputs]
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        total.add_(rows.square().sum(0) if total.dim() == 1 else rows.t() @ rows)
        memory.relax()

    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        output.register_hook(record)

    return hook
