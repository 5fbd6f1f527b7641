"""``AutoModelFor….from_pretrained`` and ``model.save_pretrained`` of transformers, for compressed models.

transformers reads ``quantization_config`` of a config before it loads weights and lets the method that it
names, here ``fips``, change the empty model first. What has to be changed is in that entry, so a config and
the weights, sharded or not, are all that loading needs. Once loaded, a model is like one that was compressed
in memory: nothing of the quantizer stays but the entry, which says what the model is whenever it is saved.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._structure import (
    FORMAT_VERSION,
    Json,
    check_structure,
    describe,
    fitted,
    rebuild,
    restore_buffer_dtypes,
)
from ..errors import CheckpointError
from ..nn import SharedMLP
from ..nn.factor import SparseFactor
from .registration import register

METHOD = "fips"
_WHERE = "config.json: quantization_config"


class FipsConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a compressed model's ``config.json``.

    Args:
        structure: as ``fips.json`` holds it, see docs/format.md.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, **structure: Any) -> None:
        structure.pop("quant_method", None)
        self.quant_method = METHOD
        self._structure: Json = {"format_version": format_version, **structure}
        self._model: weakref.ref[nn.Module] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> FipsConfig:
        """The entry of a compressed model, which follows what becomes of it."""
        config = cls(**describe(model))
        config._model = weakref.ref(model)
        return config

    @property
    def structure(self) -> Json:
        model = None if self._model is None else self._model()
        return self._structure if model is None else {"format_version": FORMAT_VERSION, **describe(model)}

    def to_dict(self) -> Json:
        return {"quant_method": self.quant_method, **copy.deepcopy(self.structure)}

    def __reduce__(self) -> tuple:
        # A copy of a config belongs to no model that we know: it says what the model is now.
        return _restored, (self.structure,)


def _restored(structure: Json) -> FipsConfig:
    return FipsConfig(**structure)


class FipsQuantizer(HfQuantizer):
    """What transformers calls while it loads a compressed model."""

    quantization_config: FipsConfig

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "quantization_config: a model is not compressed while it loads; call fips_ext.compress on it"
            )
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise CheckpointError(
                f"device_map: got {', '.join(sorted(devices))}; layers over one base have to be on its "
                "device, so a compressed model is loaded onto one, as with device_map='cuda:0'"
            )
        check_structure(self.quantization_config.structure, _WHERE)

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        self._fitted = fitted(model, self.quantization_config.structure, prefix)
        rebuild(model, self._fitted, _WHERE)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Scales are float16 whatever the model is: their type is part of the format.
        names = getattr(converter, "target_patterns", None) or []
        if any(name.endswith(".scales") for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, SparseFactor):
                module.derive_index()
        restore_buffer_dtypes(model, self._fitted)
        # Quantized models may not be trained, cast or saved from another state_dict; these may.
        for module in _models_of_transformers(model):
            module.config.__dict__.pop("_is_quantized", None)
        model.is_quantized = False
        for attribute in ("hf_quantizer", "quantization_method"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        attach(model)
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _models_of_transformers(model: nn.Module) -> Iterator[nn.Module]:
    # Not at the top: transformers imports its registry, and so this file, before it has this class.
    from transformers import PreTrainedModel

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def attach(model: nn.Module) -> None:
    """Let ``save_pretrained`` of every model of transformers that is, or is in, ``model`` say what it is."""
    seen: set[int] = set()
    for module in _models_of_transformers(model):
        if id(module) in seen:
            continue
        seen.update(id(part) for part in module.modules())  # the outermost one speaks for what is in it
        if any(isinstance(part, SharedMLP) for part in module.modules()):
            module.config.quantization_config = FipsConfig.of(module)


register()  # for whoever imports this file first
