"""Exceptions. Every message names the argument, what was given, what is allowed and what to do."""

from __future__ import annotations


class FipsError(Exception):
    """Base class of what the Python layers raise on purpose. The ops raise a plain ``ValueError``."""


class InvalidArgument(FipsError, ValueError):
    """An argument that can be put right by the caller."""


class BudgetError(InvalidArgument):
    """A byte budget that no factorisation of the given pattern can meet."""


class NumericalError(FipsError, ArithmeticError):
    """NaN or Inf in weights or activations; the message names the layer."""


class CheckpointError(FipsError):
    """A checkpoint that is missing, truncated, malformed, or written by a newer version."""


class SurgeryError(FipsError):
    """A model in which no MLP (or an ambiguous one) was found."""


class MemoryLimit(FipsError, MemoryError):
    """More memory is needed than was allowed."""
