"""The methods of a comparison, each a point of the one family of recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import InvalidArgument
from ..recipe import Pattern, Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """A named recipe.

    Attributes:
        name: unique; what the user types and the table shows.
        family: of those that compete for the same use: ``bitmap``, ``block:BKxBN`` or ``low rank``.
        about: one line.
        fields: of the recipe, over its defaults.
    """

    name: str
    family: str
    about: str
    fields: dict[str, Any]

    def recipe(self, ratio: float, **common: Any) -> Recipe:
        """The recipe at a ratio; ``common`` are the fields that all methods share."""
        return Recipe(**{"ratio": ratio, **common, **self.fields})


_PRUNING = {"base": "identity"}
# Neither looks beyond its own matrix, and neither has anything to refit.
_ONE_SHOT = {**_PRUNING, "sensitivity": "output", "refit": False}
_LOW_RANK = {"pattern": "dense", "sensitivity": "output"}


def methods_of(patterns: list[str]) -> list[Method]:
    """FiPS in every pattern, each followed by its controls, then low rank.

    - ``fips``: shared base times sparse factors.
    - ``pruning``: the same pattern of the weights themselves, ``U = I``: same sensitivities, same refit.
    - ``wanda``: Sun et al. 2023: ``|W_ij| ‖x_j‖``, equal counts per output; bitmap only.
    - ``magnitude``: ``|W_ij|``, data-free; bitmap only.
    - ``low-rank``: dense factors, bases of one block each, as SVD-LLM (Wang et al. 2024); gate and up
      share theirs.
    - ``basis-sharing``: the same, bases of two blocks (Wang et al. 2024, arXiv 2410.03765).
    """
    found = []
    for text in patterns:
        kind, pattern = Pattern.parse(text).kind, {"pattern": text}
        if kind == "dense":
            raise InvalidArgument("patterns: 'dense' is low rank, which every comparison holds; leave it out")
        found += [
            Method(f"fips:{text}", text, "shared base times sparse factors", pattern),
            Method(f"pruning:{text}", text, "U = I, same sensitivities and refit", {**pattern, **_PRUNING}),
        ]
        if kind == "bitmap":
            found += [
                Method(
                    f"wanda:{text}",
                    text,
                    "U = I, |W| times input norm, equal counts per output",
                    {**pattern, **_ONE_SHOT, "ranking": "output"},
                ),
                Method(
                    f"magnitude:{text}",
                    text,
                    "U = I, |W|, data-free",
                    {**pattern, **_ONE_SHOT, "ranking": "layer", "init": "svd"},
                ),
            ]
    return [
        *found,
        Method("low-rank", "low rank", "dense factors, bases per block", {**_LOW_RANK, "group_size": 1}),
        Method(
            "basis-sharing", "low rank", "dense factors, bases of 2 blocks", {**_LOW_RANK, "group_size": 2}
        ),
    ]
