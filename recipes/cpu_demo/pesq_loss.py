"""`training.loss: data_and_pesq`: data prediction and what a listener would say; for `plugins`.

    plugins: [recipes.cpu_demo.endless, recipes.cpu_demo.pesq_loss]

torch-pesq follows ITU-T P.862 without its alignment in time. Version 0.1.2 asks for a typeguard
that tyro has outgrown; it works beside it without its type checks, which `python -O` leaves out:

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

WEIGHT = 0.5  # of a point of MOS beside errors in units of DATA_SCALE
DATA_SCALE = 0.1  # of the config: training divides what a data loss returns by its square
_SILENT = 1e-4  # RMS of a clip in which there is nothing to hear


@LOSSES.register("data_and_pesq", predicts="data")
def data_and_pesq(given: LossInputs) -> Tensor:
    """|x0_hat - S|^2 less `WEIGHT` points of MOS: a mean over clips, frames as one signal each.

    The mapped MOS rather than its distances: near 1, where speech is lost, it is flat, so that
    clips which can still be heard decide.
    """
    return data_prediction(given) - WEIGHT * DATA_SCALE**2 * mean_opinion(given)


def mean_opinion(given: LossInputs) -> Tensor:
    """Return PESQ's MOS of the estimate, 1 to 4.6, mean of the clips that have speech; a scalar."""
    samples = (given.S.shape[-1] - 1) * given.spectral.hop_length
    with torch.autocast(given.S.device.type, enabled=False):  # its powers exceed bfloat16's digits
        clean, wave = (given.spectral.inverse(x, samples) for x in (given.S, given.x0_hat))
        heard = clean.square().mean(1).sqrt() > _SILENT
        if not heard.any():
            return given.x0_hat.real.new_zeros(())
        return torch.as_tensor(judge(given.S.device).mos(clean[heard], wave[heard]).mean())


@functools.cache
def judge(device: torch.device) -> Any:
    """Return torch-pesq's module; MissingExtraError where it cannot work."""
    package = need("torch_pesq", "data_and_pesq", "pip install --no-deps torch-pesq torchtyping")
    if __debug__:
        raise MissingExtraError("torch-pesq's type checks fail beside tyro: start it as python -O")
    return package.PesqLoss(1.0, sample_rate=16000).to(device)
