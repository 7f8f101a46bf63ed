"""The training losses, one function each: same arguments, same body, so differences stand out.

Each returns the loss of every time-frequency bin of the buffer, [B, F, Kb] real; training takes
the mean. `score` and `weighted_score` have the same optimum, score = -z / sigma.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def score(score: Tensor, x0_hat: Tensor, S: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """|score + z / sigma|^2: denoising score matching; frames weigh as 1 / sigma^2."""
    return abs2(score + z / sigma)


def weighted_score(score: Tensor, x0_hat: Tensor, S: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """|sigma score + z|^2, the authors' code: all diffusion times weigh the same."""
    return abs2(sigma * score + z)


def data_prediction(score: Tensor, x0_hat: Tensor, S: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """|x0_hat - S|^2 (Lay et al. 2025, arXiv 2510.18744)."""
    return abs2(x0_hat - S)


LossMap = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, LossMap] = {
    "score": score,
    "weighted_score": weighted_score,
    "data_prediction": data_prediction,
}


def abs2(x: Tensor) -> Tensor:
    """|x|^2 of a complex tensor, without the square root whose gradient is undefined at 0."""
    return x.real.square() + x.imag.square()


_SNR_LIMIT = 1e-3  # an error of -30 dB is good enough


def error_level(estimate: Tensor, clean: Tensor) -> Tensor:
    """Return the negative SNR of an estimate, 10 log10(|estimate - clean|^2 / |clean|^2), dB.

    Every clip counts alike, loud or not. It flattens below -30 dB; silent clips are left out.

    Args:
        estimate: linear spectrum, [B, F, K] complex.
        clean: linear spectrum, [B, F, K] complex.

    Returns:
        Scalar, the mean over clips; 0 if all are silent.
    """
    power = abs2(clean).sum(dim=(1, 2))
    heard = power > torch.finfo(power.dtype).eps
    ratio = abs2(estimate - clean).sum(dim=(1, 2)) / power.clamp_min(torch.finfo(power.dtype).eps)
    level = 10 * torch.log10(ratio + _SNR_LIMIT)
    return torch.where(heard, level, 0).sum() / heard.sum().clamp_min(1)
