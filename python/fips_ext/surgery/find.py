"""Finding the MLPs of a model by structure, never by names of models or attributes."""

from __future__ import annotations

import itertools
import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from ..errors import SurgeryError
from ..nn import SharedMLP
from .dense_mlp import DenseMLP, Slot
from .linear_map import is_conv1d, is_plain, module_of, outputs_of, shape_of
from .probe import Formula, match_activation, match_intermediate, match_mlp, runs_in_line, starts_with

_log = logging.getLogger(__name__)

# Below the smallest block edge there is nothing to factor; relative-position MLPs live there.
_SMALLEST_WIDTH = 16
_REPORTED = 4
_ADVICE = (
    "expected modules with linear maps [n, d], [d, n] (plain) or [n, d], [n, d], [d, n] (gated), n ≥ d ≥ "
    f"{_SMALLEST_WIDTH}, and an activation of fips_ext.reference.ACTIVATIONS between them"
)


@dataclass
class _Survey:
    """What one pass over a model learns.

    Attributes:
        slots: the places of each module, by ``id``.
        matches: the MLPs by the ``id`` of their linear maps, in module order.
        rejected: modules that look like an MLP and why they are none.
    """

    slots: dict[int, list[Slot]] = field(default_factory=lambda: defaultdict(list))
    matches: dict[frozenset[int], DenseMLP] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def find_mlps(model: nn.Module) -> list[DenseMLP]:
    """The transformer MLPs of ``model``, in module order.

    Recognised are gated and plain MLPs that are one module, the split form (BERT) of an intermediate
    module beside an output module, and the inline form (OPT, BART, Whisper) of two maps and an activation
    among the children of a block. Attention, heads beside the stack of blocks and experts behind a router
    are left alone. MLPs that share all their weights are one entry.

    Raises:
        SurgeryError: there is none, or one shares only some of its weights.
    """
    survey = _Survey()
    for parent in model.modules():
        for attribute, child in parent.named_children():
            survey.slots[id(child)].append(Slot(parent, attribute))
    for name, module in model.named_modules():
        _match_one_module(survey, name, module)
    for name, module in model.named_modules():
        _match_split(survey, name, module)
        _match_inline(survey, name, module)
    mlps = _without_experts(model, list(survey.matches.values()), survey)
    mlps = _without_heads(model, mlps, survey)
    mlps = _merge_shared(model, mlps)
    if not mlps:
        if any(isinstance(module, SharedMLP) for module in model.modules()):
            raise SurgeryError("model: is compressed already; pass the dense model")
        seen = [f"{name or 'the model itself'}: {why}" for name, why in survey.rejected.items()]
        more = f"; and {len(seen) - _REPORTED} more" if len(seen) > _REPORTED else ""
        raise SurgeryError(
            f"model: found no MLP in {type(model).__name__}; {_ADVICE}. "
            f"What came closest: {'; '.join(seen[:_REPORTED]) or 'nothing'}{more}"
        )
    for name, why in survey.rejected.items():
        _log.warning("%s is left dense: %s", name, why)
    return mlps


def _match_one_module(survey: _Survey, name: str, module: nn.Module) -> None:
    """Record ``module`` if it is a whole MLP: two or three linear maps and no other parameter."""
    linears = [child for child in module.modules() if isinstance(child, nn.Linear) or is_conv1d(child)]
    if len(linears) not in (2, 3) or not _nothing_but(module, linears):
        return
    formulas = match_mlp(module, linears)
    if len(formulas) == 1 and min(formulas[0].up.weight.shape) >= _SMALLEST_WIDTH:
        if survey.slots[id(module)]:
            # A wrapper computes the same as the MLP in it; the walk is top down, so the innermost stays.
            key = frozenset(map(id, linears))
            survey.matches[key] = _dense_mlp(survey, name, module, formulas[0])
        else:
            survey.rejected[name] = "an MLP that is the whole model has no place to be replaced in"
    elif why := _near_miss(linears, formulas):
        survey.rejected[name] = why


def _match_split(survey: _Survey, name: str, parent: nn.Module) -> None:
    """Record the split form: children ``a = act(up(x))`` and ``b = rest(down(a), ...)`` of one module."""
    taken = set().union(*survey.matches)
    singles = []
    for attribute, child in parent.named_children():
        linears = [m for m in child.modules() if isinstance(m, nn.Linear) and is_plain(m)]
        if len(linears) == 1 and linears[0] is not child and id(linears[0]) not in taken:
            singles.append((attribute, child, linears[0]))
    found = []
    for index, (attribute, first, up) in enumerate(singles):
        if up.out_features < up.in_features or not _nothing_but(first, [up]):
            continue
        partners = [
            (second, down)
            for _, second, down in singles[index + 1 :]
            if down.weight.shape == up.weight.t().shape
        ]
        activations = match_intermediate(first, up) if partners else []
        if len(activations) == 1:
            found += [
                (attribute, first, Formula(activations[0], up, None, down))
                for second, down in partners
                if starts_with(second, down)
            ]
    if len(found) > 1:
        survey.rejected[name] = "several pairs of children look like the two halves of an MLP"
    elif found and min(found[0][2].up.weight.shape) >= _SMALLEST_WIDTH:
        attribute, entry, formula = found[0]
        mlp = _dense_mlp(survey, f"{name}.{attribute}".lstrip("."), entry, formula)
        mlp.absorbed = list(survey.slots[id(formula.down)])
        survey.matches[frozenset((id(formula.up), id(formula.down)))] = mlp


def _match_inline(survey: _Survey, name: str, parent: nn.Module) -> None:
    """Record the inline form: ``down(act(up(x)))`` of three children, in the forward code of their parent."""
    if name in survey.rejected:
        return
    taken = set().union(*survey.matches)
    linears, acts = {}, {}
    for attribute, child in parent.named_children():
        if isinstance(child, nn.Linear) and is_plain(child) and id(child) not in taken:
            linears[attribute] = child
        elif not list(child.parameters()) and len(found := match_activation(child)) == 1:
            acts[attribute] = found[0]
    for (first, up), (last, down) in itertools.permutations(linears.items(), 2):
        out, width = shape_of(up)
        if shape_of(down) != (width, out) or not out >= width >= _SMALLEST_WIDTH:
            continue
        for between, activation in acts.items():
            if runs_in_line(parent, first, between, last):
                if max(len(survey.slots[id(up)]), len(survey.slots[id(down)])) > 1:
                    survey.rejected[name] = "its MLP is written inline, and another module shares its maps"
                    return
                formula = Formula(activation, up, None, down)
                mlp = _dense_mlp(survey, f"{name}.{first}".lstrip("."), up, formula)
                # The activation may be in other places, too; only this one is taken over.
                mlp.absorbed = [Slot(parent, between), *survey.slots[id(down)]]
                survey.matches[frozenset((id(up), id(down)))] = mlp
                return


def _dense_mlp(survey: _Survey, name: str, entry: nn.Module, formula: Formula) -> DenseMLP:
    return DenseMLP(
        name=name,
        up=formula.up,
        gate=formula.gate,
        down=formula.down,
        activation=formula.activation,
        entry=entry,
        slots=list(survey.slots[id(entry)]),
        absorbed=[],
    )


def _nothing_but(module: nn.Module, linears: list[nn.Module]) -> bool:
    """Whether ``linears`` are plain and hold every parameter of ``module``."""
    held = {id(p) for linear in linears for p in linear.parameters()}
    return all(map(is_plain, linears)) and all(id(p) in held for p in module.parameters())


def _near_miss(linears: list[nn.Module], formulas: list[Formula]) -> str:
    """Why linear maps of MLP shape are no MLP; empty when they do not look like one either.

    Square maps are what attention is made of, and narrow ones position biases: both pass without a word.
    """
    shapes = [shape_of(linear) for linear in linears]
    if len(formulas) > 1:
        names = ", ".join(sorted({formula.activation for formula in formulas}))
        return f"its output fits several activations ({names})"
    if min(min(shape) for shape in shapes) < _SMALLEST_WIDTH:
        return ""
    up, down = max(shapes), min(shapes)
    if len(shapes) == 2 and down[1] > down[0] and up == (2 * down[1], down[0]):
        return f"its map {list(up)} may be gate and up in one, but its output fits no activation"
    if up[0] > up[1] and all(shape in (up, up[::-1]) for shape in shapes) and up[::-1] in shapes:
        return "its output fits none of the supported activations, or it does more than an MLP"
    return ""


def _without_experts(model: nn.Module, mlps: list[DenseMLP], survey: _Survey) -> list[DenseMLP]:
    """Drop the items of an expert list: a router ``[experts, d]`` lives beside the list."""
    kept = []
    for mlp in mlps:
        container_name, _, _ = mlp.name.rpartition(".")
        container = model.get_submodule(container_name)
        owner = model.get_submodule(container_name.rpartition(".")[0])
        if isinstance(container, nn.ModuleList | nn.ModuleDict) and _has_router(owner, container, mlp):
            survey.rejected[container_name] = "experts behind a router are not supported"
        else:
            kept.append(mlp)
    return kept


def _has_router(owner: nn.Module, container: nn.Module, mlp: DenseMLP) -> bool:
    experts = {id(p) for p in container.parameters()}
    router = (len(container._modules), mlp.width)
    return any(tuple(p.shape) == router and id(p) not in experts for p in owner.parameters())


def _without_heads(model: nn.Module, mlps: list[DenseMLP], survey: _Survey) -> list[DenseMLP]:
    """Drop MLPs beside the stack of blocks, if there is a stack: they belong to heads."""
    stacked = [mlp for mlp in mlps if re.search(r"(^|\.)\d+(\.|$)", mlp.name)]
    if not stacked:
        return mlps
    for name in {mlp.name for mlp in mlps} - {mlp.name for mlp in stacked}:
        survey.rejected[name] = "it stands outside the stack of blocks, in a head"
    return stacked


def _merge_shared(model: nn.Module, mlps: list[DenseMLP]) -> list[DenseMLP]:
    """Join MLPs of equal parameters; refuse any other sharing, which a replacement would break."""
    holders: dict[int, dict[int, str]] = defaultdict(dict)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)][id(module)] = name
    sharing: dict[tuple, list[DenseMLP]] = defaultdict(list)
    for mlp in mlps:
        sharing[_parameter_key(mlp)].append(mlp)
    for first, *others in sharing.values():
        linears = [module_of(m) for mlp in (first, *others) for m in mlp.linears().values()]
        expected = set(map(id, linears))
        for parameter in (p for linear in linears for p in linear.parameters()):
            outside = [n for key, n in holders[id(parameter)].items() if key not in expected]
            if outside:
                raise SurgeryError(
                    f"{first.name}: shares a parameter with {', '.join(outside)}, which is not an MLP of "
                    "the same weights; share whole MLPs, or give each module its own copy"
                )
        for other in others:
            first.slots += other.slots
            first.absorbed += other.absorbed
    return [first for first, *_ in sharing.values()]


def _parameter_key(mlp: DenseMLP) -> tuple:
    parts = [(role, module_of(linear), outputs_of(linear)) for role, linear in mlp.linears().items()]
    return (
        mlp.activation,
        *((role, id(m.weight), id(m.bias), part.start) for role, m, part in parts),
    )
