"""A running level that every frame is divided by, so that a recording's loudness does not matter.

Causal: a frame's level depends on it and the frames before, and is final when the frame enters.
So a stream has the same levels as the whole signal, whatever the sizes of its pushes.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diffusion.spectral import Spectral

FLOOR = 1e-5  # full scale 1; frames below it (-100 dB) are silence and ignored
REFERENCE = 0.1  # RMS that signals are scaled to: speech at a usual level


class RunningLevel:
    """The RMS of the last seconds, in which older frames weigh less.

    L_k^2 = sum_j a^(n_k - n_j) p_j / sum_j a^(n_k - n_j) over the frames j <= k that are not
    silent, with p_j their mean square, n_j their index among those, a = exp(-hop / seconds).
    Scaling a signal scales all its levels alike, from the first frame on.
    """

    def __init__(self, seconds: float, sample_rate: int, spectral: Spectral) -> None:
        self.decay = math.exp(-spectral.hop_length / (sample_rate * seconds))
        self.spectral = spectral

    @classmethod
    def from_config(cls, cfg: Config, spectral: Spectral) -> Self | None:
        """Make the level for preprocessing.level_seconds; None if that is null."""
        seconds = cfg.preprocessing.level_seconds
        return None if seconds is None else cls(seconds, cfg.audio.sample_rate, spectral)

    def of_whole(self, Y: Tensor) -> Tensor:
        """Return the levels [B, K], RMS in full scale, of compressed frames [B, F, K]."""
        power = self._power(Y.transpose(1, 2))
        heard = (power > FLOOR**2).to(power.dtype)
        age = heard.cumsum(dim=-1)
        weights = (age[:, :, None] - age[:, None, :]).clamp_min(0)  # [B, K, K], of j in k
        weights = (self.decay**weights).tril() * heard[:, None, :]
        sums = weights @ torch.stack([power, torch.ones_like(power)], dim=-1)
        return _level(sums)

    def step(self, sums: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a frame [B, F]; return new sums [B, 2], zeros at first, and its level [B]."""
        power = self._power(R)
        new = self.decay * sums + torch.stack([power, torch.ones_like(power)], dim=-1)
        sums = torch.where(power.unsqueeze(-1) > FLOOR**2, new, sums)
        return sums, _level(sums)

    def scale(self, level: Tensor) -> Tensor:
        """Return the divisor, of any shape, that brings compressed frames to RMS `REFERENCE`."""
        return (level / REFERENCE) ** self.spectral.alpha

    def _power(self, frames: Tensor) -> Tensor:
        """Return the mean square of the samples under the window (Parseval); frames [..., F]."""
        spectral = self.spectral
        squared = (frames.abs() / spectral.beta) ** (2 / spectral.alpha)
        total = 2 * squared.sum(dim=-1) - squared[..., 0]  # both halves of the spectrum
        if spectral.n_fft % 2 == 0:
            total = total - squared[..., -1]
        return total / (spectral.n_fft * spectral.window.square().sum().to(total.dtype))


def _level(sums: Tensor) -> Tensor:
    power, weight = sums.unbind(-1)
    return (power / weight.clamp_min(1e-9)).sqrt().clamp_min(FLOOR)
