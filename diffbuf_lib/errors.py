"""The errors that diffbuf raises on purpose.

Each message names the value, the limit, the config key and the fix, on one line. The command
line prints it without a traceback; a notebook shows it like any other exception.
"""

from importlib import import_module
from typing import Any


class DiffbufError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigError(DiffbufError, ValueError):
    """A config that cannot be used: unknown key, wrong type, values that contradict each other."""


class DataError(DiffbufError, ValueError):
    """A file or folder of audio that cannot be used."""


class ShapeError(DiffbufError, ValueError):
    """A tensor whose shape is not the documented one."""


class CheckpointError(DiffbufError, RuntimeError):
    """A checkpoint or results folder that cannot be read, written or continued."""


class NonFiniteError(DiffbufError, ArithmeticError):
    """A loss or gradient that became NaN or Inf."""


class OutOfMemoryError(DiffbufError, RuntimeError):
    """A training step that needs more memory than the device has."""


class MissingExtraError(DiffbufError, ImportError):
    """An optional package that is not installed."""


def need(package: str, who: str, fix: str) -> Any:
    """Import an optional package; the MissingExtraError names who needs it and the fix."""
    try:
        return import_module(package)
    except (ImportError, OSError) as error:  # OSError: its shared library is missing
        raise MissingExtraError(f"{who} needs {package} ({error}): {fix}") from None
