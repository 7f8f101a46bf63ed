"""`training.loss: data_and_pesq`: data prediction plus perceived quality; for `plugins`.

    plugins: [recipes.cpu_demo.endless, recipes.cpu_demo.pesq_loss]

torch-pesq follows ITU-T P.862 without its alignment in time. Version 0.1.2 requires a typeguard
older than tyro accepts; both work together without its type checks, which `python -O` disables:

    pip install --no-deps torch-pesq torchtyping
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.diffusion.losses import LossInputs, data_prediction
from diffbuf_lib.errors import MissingExtraError, need
from diffbuf_lib.registry import LOSSES

WEIGHT = 0.5  # of a point of MOS, relative to errors in units of DATA_SCALE
DATA_SCALE = 0.1  # of the config: training divides what a data loss returns by its square
_SILENT = 1e-4  # RMS below which a clip counts as silent


@LOSSES.register("data_and_pesq", predicts="data")
def data_and_pesq(given: LossInputs) -> Tensor:
    """|x0_hat - S|^2 minus `WEIGHT` points of MOS: a mean over clips, each taken as one signal.

    Uses the mapped MOS, not PESQ's distances: near 1, where speech is lost, it is flat, so clips
    that can still be heard dominate.
    """
    return data_prediction(given) - WEIGHT * DATA_SCALE**2 * mean_opinion(given)


def mean_opinion(given: LossInputs) -> Tensor:
    """Return PESQ's MOS of the estimate, 1 to 4.6, averaged over clips with speech; a scalar."""
    samples = (given.S.shape[-1] - 1) * given.spectral.hop_length
    with torch.autocast(given.S.device.type, enabled=False):  # bfloat16 has too few digits
        clean, wave = (given.spectral.inverse(x, samples) for x in (given.S, given.x0_hat))
        heard = clean.square().mean(1).sqrt() > _SILENT
        if not heard.any():
            return given.x0_hat.real.new_zeros(())
        return torch.as_tensor(judge(given.S.device).mos(clean[heard], wave[heard]).mean())


@functools.cache
def judge(device: torch.device) -> Any:
    """Return torch-pesq's module; MissingExtraError if it cannot work."""
    package = need("torch_pesq", "data_and_pesq", "pip install --no-deps torch-pesq torchtyping")
    if __debug__:
        raise MissingExtraError("torch-pesq's type checks fail beside tyro: start it as python -O")
    return package.PesqLoss(1.0, sample_rate=16000).to(device)
