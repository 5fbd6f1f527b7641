"""A dense MLP found in a model, and its replacement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ..errors import SurgeryError
from ..nn import SharedMLP
from .linear_map import Linear


class AbsorbedLinear(nn.Identity):
    """Stands where an output module's linear map was, after an MLP upstream took the map over.

    A class of its own, so that a checkpoint can tell it from an identity of the original model.
    """


class Slot(NamedTuple):
    """One place in a module tree: ``parent.<attribute>``."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return self.parent._modules[self.attribute]

    def fill(self, module: nn.Module) -> None:
        self.parent.register_module(self.attribute, module)


@dataclass(eq=False)
class DenseMLP:
    """One MLP, ``y = down(act(up(x)))`` or ``y = down(act(gate(x)) ⊙ up(x))``.

    Attributes:
        name: qualified name of ``entry``.
        up, gate, down: the linear maps: weights ``[n, d]``, ``[n, d]`` and ``[d, n]``; ``gate`` is None for
            a plain MLP, and any bias may be None.
        activation: a key of ``fips_ext.reference.ACTIVATIONS``.
        entry: the module whose first positional forward argument is the input ``x [..., d]``. Its output is
            the MLP output, except in the split form (BERT), where it is the hidden activation.
        slots: every place that holds this MLP: more than one where layers share their weights.
        absorbed: split form only: the places of ``down``, which the replacement takes over.
    """

    name: str
    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    entry: nn.Module
    slots: list[Slot]
    absorbed: list[Slot]
    _replaced: list[tuple[Slot, nn.Module]] = field(default_factory=list, init=False, repr=False)

    @property
    def width(self) -> int:
        """Residual width ``d``."""
        return self.up.in_features

    @property
    def hidden(self) -> int:
        """Hidden width ``n``."""
        return self.up.out_features

    def linears(self) -> dict[str, Linear]:
        """The linear maps by role, in the order up, gate, down."""
        roles = {"up": self.up, "gate": self.gate, "down": self.down}
        return {role: linear for role, linear in roles.items() if linear is not None}

    def install(self, mlp: SharedMLP) -> None:
        """Replace this MLP in its model by ``mlp``, wherever it occurs.

        Raises:
            SurgeryError: ``mlp`` has other sizes, another activation or another number of maps, or this MLP
                has been replaced already.
        """
        wanted = (self.width, self.hidden, self.gate is not None, self.activation)
        given = (mlp.width, mlp.hidden, mlp.gate is not None, mlp.activation)
        if given != wanted:
            raise SurgeryError(
                f"mlp: (width, hidden, gated, activation) is {given}, but {self.name} needs {wanted}; "
                "build it from the weights of this MLP"
            )
        if isinstance(self.slots[0].module, SharedMLP):
            raise SurgeryError(
                f"{self.name}: has been replaced already; call find_mlps on the dense model again"
            )
        self._replaced = [(slot, slot.module) for slot in (*self.slots, *self.absorbed)]
        mlp.train(self.entry.training)
        for slot in self.slots:
            slot.fill(mlp)
        for slot in self.absorbed:
            slot.fill(AbsorbedLinear())

    @contextlib.contextmanager
    def trial(self, mlp: SharedMLP) -> Iterator[None]:
        """Within it, ``mlp`` is installed; after it this MLP is back, as if nothing had been."""
        self.install(mlp)
        try:
            yield
        finally:
            for slot, module in self._replaced:
                slot.fill(module)
            self._replaced = []

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """Within it, the modules that :meth:`install` replaced are back in the model."""
        installed = [(slot, slot.module) for slot, _ in self._replaced]
        try:
            for slot, module in self._replaced:
                slot.fill(module)
            yield
        finally:
            for slot, module in installed:
                slot.fill(module)
