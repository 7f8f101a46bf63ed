"""The training losses, one function each, in the same form so that differences stand out.

Each returns the loss of every time-frequency bin of the buffer, [B, F, Kb] real; training takes
the mean. A loss of your own (see `diffbuf_lib.registry`) may return any shape. `score` and
`weighted_score` have the same optimum, score = -z / sigma.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.diffusion.spectral import Spectral


class LossInputs(NamedTuple):
    """Inputs of a loss; all spectra are those of the buffer's frames."""

    score: Tensor  # [B, F, Kb] complex, the network's estimate of grad log p
    x0_hat: Tensor  # [B, F, Kb] complex, its estimate of S
    S: Tensor  # [B, F, Kb] complex, clean, compressed
    z: Tensor  # [B, F, Kb] complex, the noise, CN(0, 1)
    sigma: Tensor  # [B, 1, Kb], its standard deviation
    spectral: Spectral  # to invert compressed spectra: `spectral.inverse(x0_hat, samples)`


def score(given: LossInputs) -> Tensor:
    """|score + z / sigma|^2: denoising score matching; frames are weighted by 1 / sigma^2."""
    return abs2(given.score + given.z / given.sigma)


def weighted_score(given: LossInputs) -> Tensor:
    """|sigma score + z|^2, the authors' code: all diffusion times have equal weight."""
    return abs2(given.sigma * given.score + given.z)


def data_prediction(given: LossInputs) -> Tensor:
    """|x0_hat - S|^2 (Lay et al. 2025, arXiv 2510.18744)."""
    return abs2(given.x0_hat - given.S)


def abs2(x: Tensor) -> Tensor:
    """|x|^2 of a complex tensor, without the square root whose gradient is undefined at 0."""
    return x.real.square() + x.imag.square()


_SNR_LIMIT = 1e-3  # an error of -30 dB is good enough


def error_level(estimate: Tensor, clean: Tensor) -> Tensor:
    """Return the negative SNR of an estimate, 10 log10(|estimate - clean|^2 / |clean|^2), dB.

    Takes linear spectra [B, F, K] complex; returns a scalar, the mean over clips, loud or quiet.
    It flattens below -30 dB; silent clips are left out, and it is 0 if all are silent.
    """
    power = abs2(clean).sum(dim=(1, 2))
    heard = power > torch.finfo(power.dtype).eps
    ratio = abs2(estimate - clean).sum(dim=(1, 2)) / power.clamp_min(torch.finfo(power.dtype).eps)
    level = 10 * torch.log10(ratio + _SNR_LIMIT)
    return torch.where(heard, level, 0).sum() / heard.sum().clamp_min(1)
