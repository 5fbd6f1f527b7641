"""The starting point of a group: bases, slices and masks that meet a plan, before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..budget import Plan
from ..layout import to_blocks
from ..recipe import Recipe
from .cluster import balanced_assignment
from .feedback import round_with_feedback
from .mask import base_energy, saliency, select_in_pools, select_per_output, units
from .problem import SliceProblem
from .refit import refit_base, refit_values
from .rotate import Parts, rotate
from .svd import shared_basis, whitened_columns

_ROTATIONS = 8
_ARRANGEMENTS = 4  # of blocks: rounds of rotating and gathering
_SWEEPS = 2


@dataclasses.dataclass
class Factors:
    """A group in factored form, float32.

    Attributes:
        bases: ``U [d, r]``, one, or one for the input and one for the output side.
        identity: whether the bases read ``[U, I]``.
        values, masks: per layer and role ``[rows, n]``; values are zero outside their mask.
        scales: per layer and role those that the values are multiples of, see
            :func:`~.feedback.round_with_feedback`; None where the plan stores no codes.
        orders: per layer, which hidden neuron each column is ``[n]``.
        error: what :class:`SliceProblem` measures, summed over the group.
    """

    bases: list[Tensor]
    identity: bool
    values: list[dict[str, Tensor]]
    masks: list[dict[str, Tensor]]
    scales: list[dict[str, Tensor]] | None
    orders: list[Tensor]
    error: float


def factorise(layers: list[dict[str, SliceProblem]], plan: Plan, recipe: Recipe) -> Factors:
    """Factor a group in closed form.

    Args:
        layers: per layer the problem of each role (``up``, ``gate``, ``down``).
        plan: rank and stored count.
        recipe: pattern, kind of base, refit.
    """
    keys = [(i, role) for i, layer in enumerate(layers) for role in layer]
    group = _Group(layers, plan, recipe)
    group.sort_neurons()
    group.arrange()
    bases, values = group.start()
    candidates = [group.masks(bases, values)]
    if plan.identity and plan.rank > 0:
        # The two parts overlap, so a score of one entry alone says little about them together: try both.
        candidates.append(group.masks(bases, values, keep_base_rows=True))
    finished = [group.finish(bases, values, masks, recipe.refit) for masks in candidates]
    error, bases, values, masks = min(finished, key=lambda result: result[0])

    scales = None
    if plan.bits is not None:
        error, bases, values, scales = group.round(bases, values, masks, recipe.refit)

    def per_layer(tensors: list[Tensor]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = [{} for _ in layers]
        for (i, role), tensor in zip(keys, tensors, strict=True):
            found[i][role] = tensor
        return found

    return Factors(
        bases,
        plan.identity,
        per_layer(values),
        per_layer(masks),
        None if scales is None else per_layer(scales),
        group.orders,
        error,
    )


def unit_scores(layers: list[dict[str, SliceProblem]], plan: Plan, recipe: Recipe) -> list[Tensor]:
    """What dropping each unit of a group adds to its error, one tensor per slice; see :func:`factorise`."""
    group = _Group(layers, plan, recipe)
    group.sort_neurons()
    scores = group.scores(*group.start())
    return _kept(partial(units, score, plan.pattern) for score in scores)


class _Group:
    """The slices of all layers in one list, layer by layer, and how far they are arranged.

    Attributes:
        slices: normalised, columns in the order of ``orders``.
        base_of: the base of each slice.
        num_bases: 1 or 2.
        roles: slices of one layer.
        orders: per layer, which hidden neuron each column is.
    """

    def __init__(self, layers: list[dict[str, SliceProblem]], plan: Plan, recipe: Recipe) -> None:
        self.plan = plan
        self.slices = _kept(problem.normalised for layer in layers for problem in layer.values())
        self.num_bases = 2 if plan.bases == 2 else 1
        self.base_of = [self.num_bases - 1 if role == "down" else 0 for layer in layers for role in layer]
        self.roles = len(layers[0])
        # Slices, in order, whose entries compete: those of a layer, or all; 0: inside one output feature.
        self._pool = {"output": 0, "layer": self.roles}.get(recipe.effective_ranking, len(self.slices))
        self._output_axes = [0 if role == "down" else 1 for layer in layers for role in layer]
        device = self.slices[0].weight.device
        self.orders = [torch.arange(plan.shape.hidden, device=device) for _ in layers]
        self._directions: list[Tensor] = []  # P of each base, orthonormal
        self._roots: list[tuple[Tensor, Tensor]] = []
        if plan.rank > 0:
            for b in range(self.num_bases):
                direction, *roots = shared_basis(self.of_base(b, self.slices), plan.rank)
                self._directions.append(direction)
                self._roots.append(tuple(roots))

    def sort_neurons(self) -> None:
        """Order the hidden neurons of each layer by importance.

        Which neuron is which column is arbitrary, as long as all slices of a layer agree. Sorted, columns of
        similar importance share blocks, and blocks differ more from each other: more of the error is in few
        of them. Entries on their own are not helped.
        """
        if self.plan.pattern.kind != "block":
            return
        importance = [score.sum(0) for score in self.scores(*self.start())]
        for layer in range(len(self.orders)):
            total = sum(importance[layer * self.roles : (layer + 1) * self.roles])
            self._permute(layer, total.argsort(descending=True, stable=True))

    def arrange(self) -> None:
        """Make structure: rotate the bases towards the pattern, gather neurons that need the same blocks."""
        if self.plan.density >= 1:
            return
        blocks = self.plan.pattern.kind == "block"
        for _ in range(_ARRANGEMENTS if blocks else 1):
            self._rotate(_ROTATIONS // _ARRANGEMENTS if blocks else _ROTATIONS)
            if blocks:
                self._gather()

    def _permute(self, layer: int, order: Tensor) -> None:
        self.orders[layer] = self.orders[layer][order]
        members = slice(layer * self.roles, (layer + 1) * self.roles)
        self.slices[members] = [s.permuted(order) for s in self.slices[members]]

    def _gather(self) -> None:
        """Regroup the neurons of each layer for the blocks that would be kept now."""
        scores = self.scores(*self.start())
        masks = self._select(scores)
        bk, bn = self.plan.pattern.block
        for layer in range(len(self.orders)):
            members = range(layer * self.roles, (layer + 1) * self.roles)
            # Per block row of all slices: what each neuron has in it, and which block columns keep it.
            energy = torch.cat(_kept(partial(_row_energy, scores[i], bk) for i in members), 1)
            kept = torch.cat([masks[i][::bk, ::bn] for i in members])
            columns = kept.shape[1]
            capacities = torch.full((columns,), bn, device=energy.device)
            capacities[-1] -= columns * bn - energy.shape[0]
            gains = energy @ kept.to(energy.dtype)
            now = torch.arange(energy.shape[0], device=energy.device) // bn
            clusters = balanced_assignment(gains, capacities)
            if _total(gains, clusters) > _total(gains, now):
                self._permute(layer, clusters.argsort(stable=True))

    def _rotate(self, iterations: int) -> None:
        if self.plan.rank == 0 or self.plan.identity:
            return
        targets = [
            whitened_columns(self.of_base(b, self.slices), root) for b, (root, _) in enumerate(self._roots)
        ]
        self._directions = rotate(targets, self._directions, self._project, iterations)

    def start(self) -> tuple[list[Tensor], list[Tensor]]:
        """Bases and the values of every slot, before anything is dropped."""
        bases, values = self._low_rank()
        if self.plan.identity and self.plan.rank == 0:
            return bases, [s.weight for s in self.slices]
        if self.plan.identity:
            values = _kept(partial(_with_rest, s.weight, bases[b], v) for s, v, b in self.zip(values))
        return bases, values

    def zip(self, tensors: list[Tensor]):
        return zip(self.slices, tensors, self.base_of, strict=True)

    def of_base(self, index: int, items: list) -> list:
        return [item for item, b in zip(items, self.base_of, strict=True) if b == index]

    def _low_rank(self) -> tuple[list[Tensor], list[Tensor]]:
        """Dense bases and the full V of every slice."""
        if self.plan.rank == 0:
            width = self.slices[0].weight.shape[0]
            empty = self.slices[0].weight.new_zeros(width, 0)
            return [empty] * self.num_bases, [s.weight.new_zeros(0, s.weight.shape[1]) for s in self.slices]
        bases, maps = [], []
        for p, (root, inverse) in zip(self._directions, self._roots, strict=True):
            u = inverse @ p
            # Unit columns: entries of U are then of one size, and so are the rows of V as far as they can be.
            norms = u.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
            bases.append((u / norms).float())
            maps.append(((p * norms).t() @ root).float())
        values = _kept(
            partial(torch.matmul, maps[b], s.weight) for s, b in zip(self.slices, self.base_of, strict=True)
        )
        return bases, values

    def _project(self, coefficients: list[Parts]) -> list[Parts]:
        """Keep the planned number of entries of the weighted coefficients of all bases."""
        hidden = self.plan.shape.hidden
        columns = [(c for part in parts for c in part.split(hidden, dim=1)) for parts in coefficients]
        slices = [next(columns[b]) for b in self.base_of]
        masks = self._select(_kept(c.square for c in slices))
        kept = _kept(partial(torch.mul, c, mask) for c, mask in zip(slices, masks, strict=True))
        projected = []
        for b, parts in enumerate(coefficients):
            of_base = iter(self.of_base(b, kept))
            projected.append(
                [torch.cat([next(of_base) for _ in range(part.shape[1] // hidden)], 1) for part in parts]
            )
        return projected

    def masks(self, bases: list[Tensor], values: list[Tensor], keep_base_rows: bool = False) -> list[Tensor]:
        scores = self.scores(bases, values)
        if keep_base_rows:
            for score in scores:
                score[: self.plan.rank] = torch.finfo(score.dtype).max / score.numel()
        return self._select(scores)

    def scores(self, bases: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """What dropping each slot alone adds to the error."""
        return _kept(partial(self._saliency, problem, v, bases[b]) for problem, v, b in self.zip(values))

    def _saliency(self, problem: SliceProblem, v: Tensor, base: Tensor) -> Tensor:
        return saliency(v, base_energy(problem, base, self.plan.identity), problem.columns)

    def _select(self, scores: list[Tensor]) -> list[Tensor]:
        if self._pool == 0:
            slices = len(scores)
            counts = [
                (i + 1) * self.plan.count // slices - i * self.plan.count // slices for i in range(slices)
            ]
            parts = zip(scores, counts, self._output_axes, strict=True)
            return [select_per_output(score, count, axis) for score, count, axis in parts]
        pools = [scores[i : i + self._pool] for i in range(0, len(scores), self._pool)]
        return list(chain(*select_in_pools(pools, self.plan.count, self.plan.pattern)))

    def finish(
        self, bases: list[Tensor], values: list[Tensor], masks: list[Tensor], refit: bool
    ) -> tuple[float, list[Tensor], list[Tensor], list[Tensor]]:
        """Apply the masks, refit, and measure: ``(error, bases, values, masks)``."""
        identity = self.plan.identity
        values = _kept(partial(torch.mul, v, m) for v, m in zip(values, masks, strict=True))
        for _ in range(_SWEEPS if refit else 0):
            values = _kept(
                partial(refit_values, s, bases[b], identity, v, m)
                for (s, v, b), m in zip(self.zip(values), masks, strict=True)
            )
            bases = self._refit_bases(bases, values)
        return self._error(bases, values), bases, values, masks

    def round(
        self, bases: list[Tensor], values: list[Tensor], masks: list[Tensor], refit: bool
    ) -> tuple[float, list[Tensor], list[Tensor], list[Tensor]]:
        """Bring the values to multiples of scales: ``(error, bases, values, scales)``."""
        plan = self.plan
        rounded = [
            round_with_feedback(s, bases[b], plan.identity, v, m, plan.pattern.block, plan.bits)
            for (s, v, b), m in zip(self.zip(values), masks, strict=True)
        ]
        values = [v for v, _ in rounded]
        if refit:
            bases = self._refit_bases(bases, values)
        return self._error(bases, values), bases, values, [scales for _, scales in rounded]

    def _refit_bases(self, bases: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        return [
            refit_base(self.of_base(b, self.slices), base, self.of_base(b, values))
            for b, base in enumerate(bases)
        ]

    def _error(self, bases: list[Tensor], values: list[Tensor]) -> float:
        total = 0.0
        for problem, v, b in self.zip(values):
            total += problem.error(partial(self._columns_of_product, bases[b], v))
            memory.relax()
        return total

    def _columns_of_product(self, base: Tensor, v: Tensor, columns: slice) -> Tensor:
        rank = base.shape[1]
        product = base @ v[:rank, columns]
        return product + v[rank:, columns] if self.plan.identity else product


def _row_energy(scores: Tensor, bk: int) -> Tensor:
    """Of every column, the sum over each block row: ``[n, block rows]``."""
    return to_blocks(scores, (bk, 1)).sum((-2, -1))


def _with_rest(weight: Tensor, base: Tensor, v: Tensor) -> Tensor:
    """V of a base ``[U, I]``: what ``U V`` leaves of the weights is the identity's part."""
    return torch.cat([v, weight - base @ v])


def _kept(makers: Iterable[Callable[[], Any]]) -> list[Any]:
    """What each maker makes, one after the other, tensors kept; see :mod:`~..memory`."""
    made = []
    for make in makers:
        result = make()
        made.append(memory.keep(result) if isinstance(result, Tensor) else result)
        memory.relax()
    return made


def _total(gains: Tensor, clusters: Tensor) -> float:
    return float(gains.gather(1, clusters.unsqueeze(1)).double().sum())
