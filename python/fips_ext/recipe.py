"""``Recipe``: everything that reproduces a compression, as one JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from typing import Any, Literal

from .errors import InvalidArgument
from .layout import Encoding, check_block
from .quantise import LARGEST_CODE, Bits

PatternKind = Literal["bitmap", "block", "dense"]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed pattern: what is stored of V.

    ``bitmap`` (default grid 64×64), ``block:BKxBN`` and ``dense`` (density 1: low rank).
    """

    kind: PatternKind
    block: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``bitmap``, ``bitmap:BKxBN``, ``block:BKxBN`` or ``dense``."""
        match = re.fullmatch(r"(bitmap|block|dense)(?::(\d+)x(\d+))?", text)
        if match is None or (match[1] == "block" and match[2] is None):
            raise InvalidArgument(
                f"pattern: got {text!r}; allowed are 'bitmap', 'bitmap:BKxBN', 'block:BKxBN' and 'dense', "
                "for example 'block:32x32'"
            )
        default = (16, 64) if match[1] == "dense" else (64, 64)
        block = default if match[2] is None else (int(match[2]), int(match[3]))
        return cls(match[1], check_block(block))

    @property
    def encoding(self) -> Encoding:
        return "bitmap" if self.kind == "bitmap" else "block"

    def __str__(self) -> str:
        return f"{self.kind}:{self.block[0]}x{self.block[1]}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one compression; every field but ``ratio`` has a default.

    Attributes:
        ratio: bytes of the compressed MLPs (base, values, index, masks, biases) over their dense bytes in the
            same dtype, in (0, 1]; see ``budget``.
        pattern: ``bitmap``, ``bitmap:BKxBN``, ``block:BKxBN`` or ``dense``.
        budget: what ``ratio`` is of: ``bytes``, or ``macs``, the multiply-adds per token that are done. A
            bitmap multiplies its zeros, too, so that only blocks and low rank can save ``macs``.
        group_size: consecutive transformer blocks that share a base.
        rank: stored base vectors per base; None lets the budget solver choose.
        base: ``shared`` = ``U``; ``identity`` = ``I`` (plain pruning); ``both`` = ``[U, I]`` (sparse + low
            rank); ``auto`` = ``I``, or in a group ``U`` where that clearly costs the model's
            predictions less on held-out tokens.
        per_role: one base for the input side (fc1, gate, up) and one for the output side (fc2, down).
        sensitivity: what an error counts: ``loss``, what it adds to the divergence of the model's predictions
            from the dense model's; or ``output``, its share of the output of its own matrix.
        bits: store the values of V as codes of 8 or 4 bits, one float16 scale per row of a block, which is
            ``bk`` values; None stores them in the dtype of the model. Bases and biases stay in it.
        ranking: entries of V compete inside their ``layer``, so that every layer keeps as many, inside their
            ``group``, inside the whole ``model``, or for their ``output`` feature (as in Wanda; only with
            ``base="identity"`` and a bitmap). None is ``model`` with ``sensitivity="loss"``, else ``layer``.
        init: ``whitened`` (calibrated) or ``svd`` (data-free).
        refit: ridge refit of the base after masking.
        steps: optimiser steps per group of the joint block-wise training; 0 = closed form only.
        tokens_per_step: tokens of each layer in one step.
        learning_rate: relative to the RMS of each tensor.
        distill_steps: optimiser steps of the last stage, all layers together against the predictions of the
            dense model; 0 = none. One batch of calibration data a step, as costly as many block-wise ones.
        distill_learning_rate: like ``learning_rate``, of that stage.
        calibration_tokens: tokens (or patches) taken from the calibration data.
        seed: of every random choice.
        include, exclude: names of MLPs, as :func:`fips_ext.surgery.find_mlps` gives them, with ``*``, ``?``
            and ``[...]`` as in file names. Compressed are those of ``include`` (None: all) that are not of
            ``exclude``; the ratio is of them.
    """

    ratio: float
    pattern: str = "bitmap"
    budget: Literal["bytes", "macs"] = "bytes"
    group_size: int = 5
    rank: int | None = None
    base: Literal["auto", "shared", "identity", "both"] = "auto"
    per_role: bool = True
    bits: Bits | None = None
    sensitivity: Literal["loss", "output"] = "loss"
    ranking: Literal["output", "layer", "group", "model"] | None = None
    init: Literal["whitened", "svd"] = "whitened"
    refit: bool = True
    steps: int = 100
    tokens_per_step: int = 1024
    learning_rate: float = 0.01
    distill_steps: int = 0
    distill_learning_rate: float = 0.0015
    calibration_tokens: int = 32768
    seed: int = 0
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise InvalidArgument(
                f"ratio: got {self.ratio!r}; it is compressed over dense MLP bytes and must lie in (0, 1]"
            )
        if not isinstance(self.pattern, str):
            raise InvalidArgument(f"pattern: got {self.pattern!r}; expected a string such as 'bitmap'")
        Pattern.parse(self.pattern)
        for name in ("per_role", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name}: got {getattr(self, name)!r}; expected true or false")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        for name, low in (
            ("group_size", 1),
            ("steps", 0),
            ("tokens_per_step", 1),
            ("distill_steps", 0),
            ("calibration_tokens", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InvalidArgument(f"{name}: got {value!r}; expected an integer of at least {low}")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise InvalidArgument(f"rank: got {self.rank!r}; expected None or a positive integer")
        for name, allowed in (
            ("budget", ("bytes", "macs")),
            ("base", ("auto", "shared", "identity", "both")),
            ("bits", (*LARGEST_CODE, None)),
            ("sensitivity", ("loss", "output")),
            ("ranking", ("output", "layer", "group", "model", None)),
            ("init", ("whitened", "svd")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(f"{name}: got {getattr(self, name)!r}; allowed are {allowed}")
        if self.budget == "macs" and self.parsed_pattern.kind == "bitmap":
            raise InvalidArgument(
                f"budget: got 'macs' with pattern={self.pattern!r}; a bitmap multiplies its zeros, too; take "
                "a block pattern or 'dense', or budget='bytes'"
            )
        if self.ranking == "output" and (self.base != "identity" or self.parsed_pattern.kind != "bitmap"):
            raise InvalidArgument(
                f"ranking: got 'output' with base={self.base!r} and pattern={self.pattern!r}; what feeds one "
                "output is known only with base='identity' and a bitmap pattern"
            )
        for name in ("learning_rate", "distill_learning_rate"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise InvalidArgument(f"{name}: got {value!r}; expected a positive number (in YAML 1.0e-3)")

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration data."""
        return self.init == "whitened" or self.steps > 0 or self.distill_steps > 0

    @property
    def needs_loss(self) -> bool:
        """Whether the initialiser looks at the predictions of the whole model."""
        return self.init == "whitened" and self.sensitivity == "loss"

    @property
    def effective_ranking(self) -> Literal["output", "layer", "group", "model"]:
        """``ranking``, or what None stands for."""
        return self.ranking or ("model" if self.needs_loss else "layer")

    @property
    def bases(self) -> tuple[str, ...]:
        """The kinds of base to choose from, the one that costs least to compute with first."""
        if self.base != "auto":
            return (self.base,)
        # A dense V over the identity is larger than the dense model.
        return ("shared",) if self.parsed_pattern.kind == "dense" else ("identity", "shared")

    @property
    def parsed_pattern(self) -> Pattern:
        return Pattern.parse(self.pattern)

    def selects(self, name: str) -> bool:
        """Whether the MLP ``name`` is compressed."""

        def matches(globs: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

        return (self.include is None or matches(self.include)) and not matches(self.exclude or ())

    def to_dict(self) -> dict[str, Any]:
        """As JSON would give it back."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; an unknown key is an error that lists the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InvalidArgument(f"recipe: unknown keys {unknown}; known keys are {sorted(known)}")
        return cls(**fields)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _globs(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
        raise InvalidArgument(f"{name}: got {value!r}; expected None or a list of names of MLPs")
    return tuple(value)
