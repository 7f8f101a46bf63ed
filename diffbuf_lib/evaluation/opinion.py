"""Estimates of what listeners would say: DistillMOS and DNSMOS, which need no clean signal.

Both come as packages with their weights inside. Both give silence about 1.9, so silence and clips
that are too short are refused in `scoring`, never here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor


def distillmos(estimate: Tensor) -> float:
    """Return DistillMOS, 1 to 5 (Stahl, Gamper 2025).

    Args:
        estimate: [T] float32 at 16 kHz; its peak does not matter.
    """
    with torch.inference_mode():
        return float(_distillmos_model()(estimate.float().unsqueeze(0)))


def dnsmos(estimate: Tensor) -> tuple[float, float, float, float]:
    """Return DNSMOS (Reddy, Gopal, Cutler 2021 and 2022), 1 to 5.

    A clip shorter than 9.01 s is repeated up to it, as the package's authors do.

    Args:
        estimate: [T] float32 at 16 kHz, not empty; scaled down if its peak is above 1, which DNSMOS
            refuses.

    Returns:
        Overall, signal and background of P.835, and P.808's single score.
    """
    from speechmos import dnsmos as package

    peak = float(estimate.abs().max())
    scores = package.run((estimate / max(peak, 1.0)).clamp(-1, 1).numpy(), 16000)
    overall, signal, background, p808 = (
        float(scores[name]) for name in ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos")
    )
    return overall, signal, background, p808


@functools.cache
def _distillmos_model() -> Any:
    """Load the model once a process; the package prints where from, and stdout is not its own."""
    from distillmos import ConvTransformerSQAModel

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        model = ConvTransformerSQAModel()
    return model.eval()
