"""What a compression did, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One MLP.

    Attributes:
        name: qualified name in the model.
        dense_bytes, nbytes: stored bytes before and after; a base counts with the layer that owns it.
        error_before, error_after: ``Σ ‖y − dense y‖² / Σ ‖dense y‖²`` on held-out calibration tokens, before
            and after training; None where no data was used.
        seconds: this layer's share of the time of its group.
        base: ``U`` with its rank, ``I`` for the identity, or both.
    """

    name: str
    dense_bytes: int
    nbytes: int
    error_before: float | None
    error_after: float | None
    seconds: float
    base: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A compression.

    Attributes:
        layers: in model order.
        mlp_ratio: compressed over dense bytes of the MLPs: bases, values, index, masks and biases.
        linear_ratio: the same over all linear maps of the transformer blocks.
        model_ratio: the same over every tensor of the model.
        macs_ratio: multiply-adds per token of the MLPs, compressed over dense. Sharing a base saves no
            arithmetic, and bitmap zeros are multiplied too, so it can exceed 1.
        calibration_tokens: tokens used.
        divergence_before, divergence_after: of the compressed model's output from the dense one's, in nats
            per prediction (features: half their relative squared error), on held-out calibration data,
            before and after ``distill_steps``; None without any.
        seconds: in all.
        peak_memory: most bytes that were resident, since it began within ``memory.bounded``, else since the
            process did; on CUDA the most that were allocated on the device.
        inputs: all that the result depends on, fingerprints of the model and the data among it; two runs with
            equal ones end in equal tensors.
    """

    layers: list[LayerReport]
    mlp_ratio: float
    linear_ratio: float
    model_ratio: float
    macs_ratio: float
    calibration_tokens: int
    seconds: float
    peak_memory: int
    divergence_before: float | None = None
    divergence_after: float | None = None
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """Inverse of :meth:`to_dict`."""
        layers = [LayerReport(**layer) for layer in fields["layers"]]
        return cls(**{**fields, "layers": layers})

    def to_markdown(self) -> str:
        """A summary and a table of the layers."""
        lines = [
            "| bytes, compressed over dense | |",
            "|---|---|",
            f"| MLPs | {self.mlp_ratio:.4f} |",
            f"| all block linears | {self.linear_ratio:.4f} |",
            f"| whole model | {self.model_ratio:.4f} |",
            f"| MACs of the MLPs | {self.macs_ratio:.3f} |",
            "",
            f"{self.calibration_tokens:,} calibration tokens, {self.seconds:.0f} s, "
            f"peak memory {self.peak_memory / 2**30:.2f} GiB.",
            "",
            *self._distilled(),
            "| layer | base | dense bytes | bytes | ratio | error before training | error after | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {layer.name} | {layer.base} | {layer.dense_bytes:,} | {layer.nbytes:,} | "
            f"{layer.nbytes / layer.dense_bytes:.3f} | {_error(layer.error_before)} | "
            f"{_error(layer.error_after)} | {layer.seconds:.1f} |"
            for layer in self.layers
        ]
        return "\n".join(lines) + "\n"

    def _distilled(self) -> list[str]:
        if self.divergence_before is None:
            return []
        before, after = _error(self.divergence_before), _error(self.divergence_after)
        return [f"Divergence from the dense model: {before} nats before distillation, {after} after.", ""]


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
