"""Predictive GPU clock throttling for mixture-of-experts serving."""

__version__ = "0.1.0"
