"""Block-wise training against the dense model's activations."""

from .activations import ActivationStore, collect, held_out_rows, product_dtype
from .calibration import Calibration, calibrate
from .distill import batches_for, distill
from .divergence import Divergence
from .loop import LayerData, train_group
from .sensitivity import Sensitivity, SensitivityMeter
from .teacher import Observation, check_weights, observe, weight_problems
from .token_loss import next_token_losses

__all__ = [
    "ActivationStore",
    "Calibration",
    "Divergence",
    "LayerData",
    "Observation",
    "Sensitivity",
    "SensitivityMeter",
    "batches_for",
    "calibrate",
    "check_weights",
    "collect",
    "distill",
    "held_out_rows",
    "next_token_losses",
    "observe",
    "product_dtype",
    "train_group",
    "weight_problems",
]
