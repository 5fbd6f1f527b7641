"""Closed-form starting points: whitened shared bases, masks ranked over a group, least-squares refits."""

from .problem import SliceProblem
from .start import Factors, factorise

__all__ = ["Factors", "SliceProblem", "factorise"]
