"""The model's formulas, computed by other means: scipy's quadrature and librosa's STFT.

The notebooks' checks compare with these. Nothing here calls the code that is checked.
"""

from __future__ import annotations

import math
from typing import Any

import librosa
import numpy as np
import scipy.integrate
import scipy.signal
import torch
from torch import Tensor

from diffbuf_lib.config import Config, SDEConfig

_AUTHORS_THETA = 0.08  # where a config gives neither c nor theta


def spectrum(wave: Tensor, cfg: Config) -> Tensor:
    """Return beta |c|^alpha e^{i angle c}, [B, F, K] complex64, of a wave [B, C, T] by librosa."""
    stft, compression = cfg.audio.stft, cfg.preprocessing.magnitude_compression
    window = scipy.signal.get_window(stft.window.removeprefix("sqrt_"), stft.win_length)
    frames = librosa.stft(
        wave.double().mean(dim=1).numpy(force=True),
        n_fft=stft.n_fft,
        hop_length=stft.hop_length,
        win_length=stft.win_length,
        window=np.sqrt(window) if stft.window.startswith("sqrt_") else window,
        center=stft.center,
        pad_mode="constant",
    )
    magnitude = compression.beta * np.abs(frames) ** compression.alpha
    return torch.from_numpy(magnitude * np.exp(1j * np.angle(frames))).to(torch.complex64)


def sigma(sde: SDEConfig, t: Tensor) -> Tensor:
    """Return the standard deviation of X_t, by integrating the noise added and the decay by drift.

        sigma(t)^2 = Int_0^t g(s)^2 (rest(t) / rest(s))^2 ds

    holds for every linear SDE dX = -(ln rest)' (Y - X) dt + g dw.
    """
    values = [math.sqrt(_variance(sde, float(time))) for time in t.flatten()]
    return torch.tensor(values, dtype=t.dtype).view(t.shape)


def perturbed(S: Tensor, Y: Tensor, t: Tensor, z: Tensor, sde: SDEConfig) -> Tensor:
    """Return V: S before the buffer, and rest(t) S + (1 - rest(t)) Y + sigma(t) z within it.

    S and Y are [B, F, K], z is [B, F, Kb], all complex; t is [B, Kb].
    """
    first = S.shape[-1] - t.shape[-1]
    rest = torch.tensor([_rest(sde, float(time)) for time in t.flatten()]).view(t.shape)[:, None]
    mean = rest * S[..., first:] + (1 - rest) * Y[..., first:]
    return torch.cat([S[..., :first], mean + sigma(sde, t)[:, None] * z], dim=-1)


def _variance(sde: SDEConfig, t: float) -> float:
    value, _ = scipy.integrate.quad(
        lambda s: (_diffusion(sde, s) * _rest(sde, t) / _rest(sde, s)) ** 2, 0, t, epsrel=1e-8
    )
    return float(value)


def _rest(sde: SDEConfig, t: float) -> float:
    """Return how much of X_0 is left in the mean at t."""
    options: Any = sde.diffusion
    return 1 - t if sde.type == "bbed" else math.exp(-options.gamma * t)


def _diffusion(sde: SDEConfig, t: float) -> float:
    """Return g(t)."""
    options: Any = sde.diffusion
    if sde.type == "bbed":
        theta = _AUTHORS_THETA if options.theta is None else options.theta
        c = math.sqrt(theta) if options.c is None else options.c
        return float(c * options.k**t)
    low, high = options.sigma_min, options.sigma_max
    return float(low * (high / low) ** t * math.sqrt(2 * math.log(high / low)))
