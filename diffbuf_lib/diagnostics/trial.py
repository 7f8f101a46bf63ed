"""One real forward and backward pass on one clip, as training would make it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from diffbuf_lib.diagnostics.watch import watch_modules
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training.memory import SavedBytes, saved_bytes

_SCALES = (2.0**16, 2.0**8, 1.0)  # of the float16 loss: a scaler starts at the first


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass came to.

    Attributes:
        loss: the loss.
        grad_norm: of all gradients together, after unscaling.
        nonfinite: elements of gradients that are NaN or Inf.
        seconds: of both passes.
        saved: bytes that autograd kept.
        where: first stage and module with a non-finite value; empty if all is well.
    """

    loss: float
    grad_norm: float
    nonfinite: int
    seconds: float
    saved: SavedBytes
    where: str = ""

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and self.nonfinite == 0


def run_pass(
    model: DiffusionBufferModel, mix: Tensor, target: Tensor, precision: torch.dtype | None
) -> Pass:
    """Run forward and backward once; in float16 with the scales that a scaler would try."""
    device = mix.device
    for scale in _SCALES if precision is torch.float16 else (1.0,):
        model.zero_grad()
        generator = torch.Generator(device).manual_seed(model.cfg.training.seed)
        start = time.perf_counter()
        with saved_bytes(model) as saved:
            with autocast(device, precision):
                loss = model(mix, target, generator)
            (loss * scale).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        gradients = [p.grad / scale for p in model.parameters() if p.grad is not None]
        nonfinite = int(sum((~g.isfinite()).sum() for g in gradients))
        if nonfinite == 0:
            break
    norm = float(torch.nn.utils.get_total_norm(gradients))
    where = "" if loss.detach().isfinite() else _where(model, mix, target, precision)
    return Pass(float(loss.detach()), norm, nonfinite, seconds, saved, where)


def _where(
    model: DiffusionBufferModel, mix: Tensor, target: Tensor, precision: torch.dtype | None
) -> str:
    """Name the first stage and the first module whose values are not finite."""
    generator = torch.Generator(mix.device).manual_seed(model.cfg.training.seed)
    with torch.no_grad(), watch_modules(model) as watch, autocast(mix.device, precision):
        stage = model.trace(mix, target, generator).summary().first_nonfinite
    module = watch.first_nonfinite
    return f"stage {stage}" + (f", module {module}" if module else "")


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Return mixed precision in a type; none for None."""
    return torch.autocast(device.type, precision, enabled=precision is not None)
