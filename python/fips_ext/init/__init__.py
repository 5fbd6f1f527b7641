"""Closed-form starting points: whitened shared bases, masks ranked over a group, least-squares refits."""

from .allocate import LAYER_SCALE, ScoreCurve, allocate
from .problem import SliceProblem
from .start import Factors, factorise, unit_scores

__all__ = ["LAYER_SCALE", "Factors", "ScoreCurve", "SliceProblem", "allocate", "factorise", "unit_scores"]
