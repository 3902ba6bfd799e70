"""Errors of this package. Each message says what, which value, and what is allowed."""

from __future__ import annotations


class PredictorsError(Exception):
    """Base of every error that this package raises on purpose."""


class ArchitectureError(PredictorsError):
    """A model's dimensions cannot be known from what was given."""


class BundleError(PredictorsError):
    """A bundle on disk is missing, damaged or made for something else."""


class RecordsError(PredictorsError):
    """Iteration records cannot be read, or cannot be trained on."""
