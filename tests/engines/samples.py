"""Recorded calls of real engines, played to the adapters."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

DATA = Path(__file__).resolve().parent.parent / "data"


def lines(*parts):
    return [json.loads(line) for line in DATA.joinpath(*parts).read_text().splitlines()]


def namespace(value, plain=()):
    """JSON as objects with attributes, as engines hand them over; `plain` keys stay as they are."""
    if isinstance(value, dict):
        return SimpleNamespace(
            **{key: each if key in plain else namespace(each, plain) for key, each in value.items()}
        )
    if isinstance(value, list):
        return [namespace(each, plain) for each in value]
    return value


class Sink:
    """Keeps what an adapter sends."""

    def __init__(self):
        self.states = []
        self.closed = False
        self.latest_decision = None

    def submit(self, state):
        self.states.append(state)

    def close(self, timeout_seconds=2.0):
        self.closed = True
