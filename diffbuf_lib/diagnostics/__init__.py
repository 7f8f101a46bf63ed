"""Diagnostics: the doctor before a run, statistics and watched modules while it runs.

Names are imported when they are asked for, since training uses parts of this package and other
parts of it use training.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Finding": "findings",
    "examine": "doctor",
    "examine_paths": "doctor",
    "gradient_statistics": "gradients",
    "has_error": "findings",
    "score_statistics": "stats",
    "watch_modules": "watch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
