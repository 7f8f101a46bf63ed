"""The optimizer, and how its learning rate changes during a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from diffbuf_lib.config import TrainingConfig
from diffbuf_lib.registry import OPTIMIZERS
from diffbuf_lib.training.metrics import lower_is_better

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan's Muon
_MUON_MOMENTUM = 0.95
_RMS_OF_ADAM = 0.2  # of an update's entries: one learning rate then serves both rules
_LEVEL = 0.3  # share of a run before a linear learning rate falls


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for weights of two or more axes, AdamW for all others.

    The update of a weight matrix is its momentum with all singular values brought close to 1, so
    that a step moves all directions of a layer alike. A convolution's kernel is the matrix
    [C_out, all else], which `torch.optim.Muon` does not take. Updates are scaled by
    0.2 sqrt(max(rows, columns)), as in Liu et al. 2025 (arXiv 2502.16982): learning rate and
    decoupled weight decay can then have the values that suit AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, as every torch optimizer does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        matrices: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    matrices.append((p, p.grad))
                    self._move(p, p.grad, group["lr"], group["weight_decay"])
                    p.grad = None  # so that AdamW leaves it alone
        super().step()
        for p, gradient in matrices:
            p.grad = gradient
        return loss

    def _move(self, p: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one when it loads a state
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - _MUON_MOMENTUM)
        ahead = gradient.lerp(momentum, _MUON_MOMENTUM)  # Nesterov's
        matrix = ahead.flatten(1)
        size = _RMS_OF_ADAM * math.sqrt(max(matrix.shape))
        p.mul_(1 - lr * weight_decay)
        p.add_(orthogonalise(matrix).view(p.shape), alpha=-lr * size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix [M, N] close to 1 (0.7 to 1.2) and keep its directions.

    A Newton-Schulz iteration in bfloat16: matrix products only. Five steps are enough for singular
    values above about 2e-3 of the Frobenius norm; smaller ones grow, but stay below 1.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def make_optimizer(
    training: TrainingConfig, model: nn.Module, lr: float | None = None
) -> torch.optim.Optimizer:
    """Make `training.optimizer` for all parameters of a model; lr: None for `training.lr`."""
    rule: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[training.optimizer].load()
    options = {"lr": training.lr if lr is None else lr, "weight_decay": training.weight_decay}
    return rule(model.parameters(), **options, **training.optimizer_options.model_dump())


def make_scheduler(
    training: TrainingConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> ReduceLROnPlateau | LambdaLR:
    """Make `training.lr_schedule`: "plateau" follows validations, "linear" follows steps.

    Linear: up over warmup_steps, level until 30 % of the run, then down to zero at its end. It
    counts all steps of the run, including those that changed no weight.
    """
    if training.lr_schedule == "linear":
        fall = (1 - _LEVEL) * total_steps

        def factor(steps: int) -> float:
            rise = (steps + 1) / (training.warmup_steps + 1)
            return min(1.0, rise, max(0.0, (total_steps - steps) / fall))

        return LambdaLR(optimizer, factor)
    # Any gain counts, as for the best checkpoint. Torch's own threshold is relative, and for
    # a negative SI-SDR counts a slightly worse score as a gain.
    return ReduceLROnPlateau(
        optimizer,
        mode="min" if lower_is_better(training.metric_for_scheduler) else "max",
        factor=training.reduce_factor,
        patience=training.patience,
        threshold=0.0,
        threshold_mode="abs",
        eps=0.0,  # torch's default does not reduce small rates
    )
