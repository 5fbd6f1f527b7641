"""Block-wise training against the dense model's activations."""

from .activations import ActivationStore, collect, held_out_rows
from .loop import LayerData, train_group
from .teacher import Observation, check_weights, observe, weight_problems

__all__ = [
    "ActivationStore",
    "LayerData",
    "Observation",
    "check_weights",
    "collect",
    "held_out_rows",
    "observe",
    "train_group",
    "weight_problems",
]
