"""What a dense MLP does on the calibration tokens: its outputs, and how weight errors reach them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import distributed, memory
from ..errors import NumericalError
from ..init import SliceProblem
from ..reference import ACTIVATIONS
from ..surgery import DenseMLP
from .sensitivity import Sensitivity

_CHUNK = 2048
_DAMPING = 1e-3

OUTLIER = 10.0
"""A token of more than this times the median ``‖y‖²`` (or ``‖x‖²``) counts as one of that power."""


@dataclasses.dataclass
class Observation:
    """One dense MLP on the calibration tokens; means over the training rows.

    Outliers are held down by :func:`token_weights`: outputs and hidden activations by the size of the output,
    inputs by their own. A token with a huge output has an ordinary input behind its norm, and what makes the
    output huge is in the weights: not to count it would be to lose it.

    Attributes:
        weights: what each token counts ``[tokens]``, float32, by its output.
        power: mean of ``‖y‖²``.
        metric: ``E[x xᵀ] [d, d]`` of its inputs, float32.
        energy: ``E[h_j²] [n]`` of its hidden activations, float32.
    """

    weights: Tensor
    power: float
    metric: Tensor
    energy: Tensor

    def problems(self, mlp: DenseMLP, sensitivity: Sensitivity | None = None) -> dict[str, SliceProblem]:
        """What an initialiser minimises for each role of ``mlp``.

        The error of up and gate counts in the metric of the inputs, that of column ``j`` of down with
        ``E[h_j²]``. With a ``sensitivity`` ``g`` they are weighted further, by ``E[g_j²]`` of their column
        and in the metric ``E[g gᵀ]`` of the output: half of each error is then in nats, with gradients and
        activations taken as independent (as in K-FAC, Martens and Grosse 2015). Without one they are relative
        to the energy of the outputs of their own matrix.
        """
        if sensitivity is None:
            problems = {}
            for role, weight in oriented_weights(mlp).items():
                columns = self.energy.sqrt() if role == "down" else torch.ones_like(self.energy)
                problems[role] = _relative(weight, None if role == "down" else self.metric, columns)
            return problems
        down = memory.keep(_damped(sensitivity.output).float())
        metrics = {"up": self.metric, "gate": self.metric, "down": down}
        columns = {"up": sensitivity.up, "gate": sensitivity.gate, "down": self.energy}
        return {
            role: SliceProblem(weight, metrics[role], columns[role].sqrt().float())
            for role, weight in oriented_weights(mlp).items()
        }


def check_weights(mlp: DenseMLP) -> None:
    """Raise ``NumericalError`` naming the layer if a weight or bias is NaN or Inf."""
    for role, linear in mlp.linears().items():
        for name, tensor in linear.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise NumericalError(
                    f"{mlp.name}: {role}.{name} holds NaN or Inf; the dense model is damaged, load it again"
                )


@torch.no_grad()
def observe(
    mlp: DenseMLP,
    inputs: Tensor,
    targets: Tensor,
    compute_dtype: torch.dtype,
    held_out: int = 0,
    team: distributed.Team = distributed.ALONE,
) -> Observation:
    """Run the dense MLP over its calibration inputs.

    Args:
        inputs: ``[tokens, d]`` on the host.
        targets: gets the outputs, ``[tokens, d]`` on the host.
        held_out: trailing rows that only get targets and weights.
        compute_dtype: of the matrix products; sums are taken in float32 or better.
        team: shares out the rows; all of it must call this.

    Raises:
        NumericalError: an activation or output is NaN or Inf.
    """
    weights = {role: linear.weight.detach() for role, linear in mlp.linears().items()}
    biases = {role: linear.bias for role, linear in mlp.linears().items()}
    device, width, hidden = mlp.up.weight.device, mlp.width, mlp.hidden
    low = {role: weight.to(compute_dtype) for role, weight in weights.items()}
    metric = torch.zeros(width, width, dtype=torch.float64, device=device)
    moment = torch.zeros(hidden, dtype=torch.float64, device=device)  # E[h_j²]
    token_weight = torch.empty(inputs.shape[0])
    counted = inputs.shape[0] - held_out
    power = torch.zeros((), dtype=torch.float64, device=device)
    limit = input_limit = None
    strange = torch.zeros((), device=device)  # chunks with outputs that are not finite

    def linear(role: str, x: Tensor) -> Tensor:
        y = (x.to(compute_dtype) @ low[role].t()).float()
        return y if biases[role] is None else y + biases[role].float()

    for number, start in enumerate(range(0, inputs.shape[0], _CHUNK)):
        rows = slice(start, start + _CHUNK)
        if not team.takes(number):
            targets[rows], token_weight[rows] = 0, 0
            if number > 0:  # the first says what an outlier is
                continue
        x = inputs[rows].to(device)
        pre = {role: linear(role, x) for role in weights if role != "down"}
        act = ACTIVATIONS[mlp.activation]
        h = act(pre["gate"]) * pre["up"] if "gate" in pre else act(pre["up"])
        y = linear("down", h)
        powers, input_powers = y.square().sum(1), x.float().square().sum(1)
        if limit is None:
            limit, input_limit = OUTLIER * powers.median(), OUTLIER * input_powers.median()
            if not team.takes(number):
                continue
        w = token_weights(powers, limit)
        targets[rows], token_weight[rows] = y.to(targets), w.to(token_weight)
        strange += ~powers.isfinite().all()
        # Zero weight keeps the held-out rows out of every sum.
        trained = torch.arange(start, start + w.shape[0], device=device) < counted
        w = w * trained
        power += (w * powers).double().sum()
        weighted = x.float() * (trained * token_weights(input_powers, input_limit)).sqrt().unsqueeze(1)
        metric += (weighted.t() @ weighted).double()
        moment += (w @ h.square()).double()

    tokens = max(1, counted)
    team.add_up((metric, moment, power, strange))
    for part in (targets, token_weight):
        team.join_parts(part)
    if not (strange == 0 and bool(metric.isfinite().all())):
        raise NumericalError(
            f"{mlp.name}: NaN or Inf in its activations on the calibration data; check the inputs, or load "
            "the model in bfloat16 or float32"
        )
    metric = memory.keep((metric / tokens).float())
    memory.relax()
    return Observation(token_weight, float(power) / tokens, metric, (moment / tokens).float())


def _damped(metric: Tensor) -> Tensor:
    """With a little of its mean eigenvalue everywhere: sampled gradients miss directions."""
    floor = _DAMPING * metric.diagonal().mean()
    return metric + floor * torch.eye(metric.shape[0], dtype=metric.dtype, device=metric.device)


def token_weights(powers: Tensor, limit: Tensor) -> Tensor:
    """``min(1, limit / ‖y_t‖²)``: what a token counts, by the squared norms ``powers``.

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
    return {
        role: _relative(weight, None, torch.ones(mlp.hidden, device=weight.device))
        for role, weight in oriented_weights(mlp).items()
    }


def oriented_weights(mlp: DenseMLP) -> dict[str, Tensor]:
    """``W [d, n]`` of each role, float32: transposed for up and gate."""
    weights = {role: linear.weight.detach() for role, linear in mlp.linears().items()}
    found = {}
    for role, weight in weights.items():
        found[role] = memory.keep((weight if role == "down" else weight.t()).float().contiguous())
        memory.relax()
    return found


def _relative(weight: Tensor, metric: Tensor | None, columns: Tensor) -> SliceProblem:
    """The problem in units of its own size: dropping all of ``weight [d, n]`` is an error of 1."""
    problem = SliceProblem(weight, metric, columns)
    scale = max(problem.energy(), torch.finfo(torch.float32).tiny) ** -0.5
    return dataclasses.replace(problem, columns=columns * scale)
