"""What a dense MLP does on the calibration tokens: its outputs, and how weight errors reach them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import NumericalError
from ..init import SliceProblem
from ..reference import ACTIVATIONS
from ..surgery import DenseMLP

_CHUNK = 2048

OUTLIER = 10.0
"""A token of more than this times the median ``‖y‖²`` counts as one of that power."""


@dataclasses.dataclass
class Observation:
    """One dense MLP on the calibration tokens.

    Attributes:
        targets: its outputs ``[tokens, d]`` on the host, in the dtype of the inputs.
        weights: what each token counts ``[tokens]``, float32, see :func:`token_weights`.
        power: weighted mean of ``‖y‖²`` over the training rows.
        problems: what an initialiser minimises for each role.
    """

    targets: Tensor
    weights: Tensor
    power: float
    problems: dict[str, SliceProblem]


def check_weights(mlp: DenseMLP) -> None:
    """Raise ``NumericalError`` naming the layer if a weight or bias is NaN or Inf."""
    for role, linear in mlp.linears().items():
        for name, tensor in linear.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise NumericalError(
                    f"{mlp.name}: {role}.{name} holds NaN or Inf; the dense model is damaged, load it again"
                )


@torch.no_grad()
def observe(mlp: DenseMLP, inputs: Tensor, compute_dtype: torch.dtype, held_out: int = 0) -> Observation:
    """Run the dense MLP over its calibration inputs.

    To first order, an error ``δ`` in column ``j`` of the weight of up moves the output by ``(x δ) g_j`` times
    row ``j`` of down, with ``g_j`` the derivative of the hidden value by that pre-activation. So the error of
    up and gate counts with ``c_j² = E[g_j²] ‖down_j‖² / E‖y‖²`` in the metric ``E[x xᵀ]``, that of down with
    ``c_j² = E[h_j²] / E‖y‖²``. All means are over the training rows, by :func:`token_weights`.

    Args:
        inputs: ``[tokens, d]`` on the host.
        held_out: trailing rows that only get targets and weights.
        compute_dtype: of the matrix products; sums are taken in float32 or better.

    Raises:
        NumericalError: an activation or output is NaN or Inf.
    """
    weights = {role: linear.weight.detach() for role, linear in mlp.linears().items()}
    biases = {role: linear.bias for role, linear in mlp.linears().items()}
    device, width, hidden = mlp.up.weight.device, mlp.width, mlp.hidden
    low = {role: weight.to(compute_dtype) for role, weight in weights.items()}
    metric = torch.zeros(width, width, dtype=torch.float64, device=device)
    moments = {role: torch.zeros(hidden, dtype=torch.float64, device=device) for role in weights}
    targets, token_weight = torch.empty_like(inputs), torch.empty(inputs.shape[0])
    counted = inputs.shape[0] - held_out
    power = 0.0
    limit = None
    finite = True

    def linear(role: str, x: Tensor) -> Tensor:
        y = (x.to(compute_dtype) @ low[role].t()).float()
        return y if biases[role] is None else y + biases[role].float()

    for start in range(0, inputs.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        x = inputs[rows].to(device)
        pre = {role: linear(role, x) for role in weights if role != "down"}
        h, gains = _hidden(pre, mlp.activation)
        y = linear("down", h)
        powers = y.square().sum(1)
        if limit is None:
            limit = OUTLIER * powers.median()
        w = token_weights(powers, limit)
        targets[rows], token_weight[rows] = y.to(targets), w.to(token_weight)
        finite = finite and bool(powers.isfinite().all())
        # Zero weight keeps the held-out rows out of every sum.
        w = w * (torch.arange(start, start + w.shape[0], device=device) < counted)
        power += float((w * powers).double().sum())
        weighted = x.float() * w.sqrt().unsqueeze(1)
        metric += (weighted.t() @ weighted).double()
        for role, value in (*gains.items(), ("down", h)):
            moments[role] += (w @ value.square()).double()

    tokens = max(1, counted)
    if not (finite and bool(metric.isfinite().all())):
        raise NumericalError(
            f"{mlp.name}: NaN or Inf in its activations on the calibration data; check the inputs, or load "
            "the model in bfloat16 or float32"
        )
    power /= tokens
    reach = weights["down"].double().square().sum(0)  # ‖down_j‖²
    problems = {}
    for role, weight in weights.items():
        squared = moments[role] / tokens / max(power, torch.finfo(torch.float64).tiny)
        squared = squared if role == "down" else squared * reach
        oriented = weight.float() if role == "down" else weight.float().t().contiguous()
        problems[role] = SliceProblem(
            oriented, None if role == "down" else (metric / tokens).float(), squared.sqrt().float()
        )
    return Observation(targets, token_weight, power, problems)


def token_weights(powers: Tensor, limit: Tensor) -> Tensor:
    """``min(1, limit / ‖y_t‖²)``: what a token counts.

    Language models hold a few tokens (often the first of a sequence) whose outputs are thousands of times
    larger than all others. Unweighted, they are the whole loss of their layer.
    """
    return (
        (limit / powers.clamp_min(torch.finfo(powers.dtype).tiny)).clamp(max=1)
        if limit > 0
        else (torch.ones_like(powers))
    )


def weight_problems(mlp: DenseMLP) -> dict[str, SliceProblem]:
    """The data-free problem: every matrix by the relative error of its weights."""
    problems = {}
    for role, linear in mlp.linears().items():
        weight = linear.weight.detach().float()
        oriented = weight if role == "down" else weight.t().contiguous()
        norm = oriented.norm().clamp_min(torch.finfo(torch.float32).tiny)
        problems[role] = SliceProblem(oriented, None, oriented.new_ones(mlp.hidden) / norm)
    return problems


def _hidden(pre: dict[str, Tensor], activation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The hidden values ``[T, n]`` and their derivative by the pre-activation of each role."""
    act = ACTIVATIONS[activation]
    inner = pre["gate" if "gate" in pre else "up"]
    with torch.enable_grad():
        leaf = inner.detach().requires_grad_()
        value = act(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    value = value.detach()
    if "gate" not in pre:
        return value, {"up": slope}
    return value * pre["up"], {"gate": slope * pre["up"], "up": value}
