"""``AutoModelFor….from_pretrained`` and ``model.save_pretrained`` of transformers, for compressed models.

transformers reads ``quantization_config`` of a config before it loads weights and lets the method that it
names, here ``fips``, change the empty model first. What has to be changed is in that entry, so a config and
the weights, sharded or not, are all that loading needs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._structure import FORMAT_VERSION, Json, check_structure, describe, rebuild, restore_buffer_dtypes
from ..errors import CheckpointError
from ..nn.factor import SparseFactor

METHOD = "fips"


class FipsConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a compressed model's ``config.json``.

    Args:
        structure: as ``fips.json`` holds it, see docs/format.md.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, **structure: Any) -> None:
        structure.pop("quant_method", None)
        self.quant_method = METHOD
        self.structure: Json = {"format_version": format_version, **structure}

    @classmethod
    def of(cls, model: nn.Module) -> FipsConfig:
        """The entry for a compressed model."""
        return cls(**describe(model))

    def to_dict(self) -> Json:
        return {"quant_method": self.quant_method, **copy.deepcopy(self.structure)}


class FipsQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a compressed model."""

    quantization_config: FipsConfig

    def validate_environment(self, *_args: Any, **_kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "quantization_config: a model is not compressed while it loads; call fips_ext.compress on it"
            )
        check_structure(self.quantization_config.structure, "config.json: quantization_config")

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        rebuild(model, self.quantization_config.structure)

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
        restore_buffer_dtypes(model, self.quantization_config.structure)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, **_kwargs: Any) -> tuple[None, dict[str, str]]:
        # Called before the config is written: it must say what the model is by now.
        self.quantization_config = model.config.quantization_config = FipsConfig.of(model)
        return None, {}

    def is_serializable(self, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module) -> None:
    """Let transformers' own ``save_pretrained`` write ``model``, which was compressed in memory."""
    config = FipsConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = FipsQuantizer(config, pre_quantized=True)
