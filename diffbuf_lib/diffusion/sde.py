"""The stochastic differential equations dX = f(X, Y) dt + g(t) dw, from clean X to noisy Y.

Times `t` broadcast against spectra along their last axis, the frames: with x [B, F, Kb] a t of
[B, Kb] gives every frame its own time. Everything stays on t's device and in its precision.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from diffbuf_lib.config import SDEConfig
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.registry import SDES


class SDE(Protocol):
    """What the buffer needs of an SDE; x0, x and y [B, F, Kb] complex, t [B, Kb]."""

    def mean(self, x0: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """E[X_t | x0, y]."""

    def std(self, t: Tensor) -> Tensor:
        """sigma(t), of t's shape: X_t = mean + sigma z with z ~ CN(0, 1)."""

    def drift(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """f(x, y) at t."""

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), of t's shape."""

    def denoised(self, xt: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The x0 whose mean at t is xt."""


def make_sde(cfg: SDEConfig) -> SDE:
    """Make the SDE of `cfg.sde`."""
    sde: SDE = SDES[cfg.type].load()(**cfg.diffusion.model_dump())
    return sde


class BBED:
    """Brownian bridge with exponential diffusion (Lay et al. 2023, eq. 10-14).

    f = (Y - X) / (1 - t), g(t) = c k^t, mean (1 - t) x0 + t y, and

        sigma(t)^2 = c^2 (1 - t) [k^{2t} - 1 + t
                     + 2 k^2 ln(k) (1 - t) (Ei(2 (t - 1) ln k) - Ei(-2 ln k))].

    The paper of the Diffusion Buffer prints c = 0.08; its authors' code has theta = 0.08 and
    c = sqrt(theta) = 0.283, a sigma 3.5 times as large. Giving both raises ConfigError;
    theta is 0.08 if neither is given.
    """

    def __init__(self, k: float = 2.6, theta: float | None = None, c: float | None = None) -> None:
        if c is not None and theta is not None:
            both = f"c {c} and theta {theta} are both given"
            raise ConfigError(f"{both}, but c = sqrt(theta): remove one")
        self.k, self.log_k = k, math.log(k)
        self.c = c if c is not None else math.sqrt(0.08 if theta is None else theta)
        # Ei(-x) = gamma + ln x + sum_n (-x)^n / (n n!) (Abramowitz and Stegun, 5.1.10).
        x = 2 * self.log_k
        self._series = [(-x) ** n / (n * math.factorial(n)) for n in range(1, 24)]
        while abs(self._series[-1]) > 1e-18:
            n = len(self._series) + 1
            self._series.append(self._series[-1] * -x * (n - 1) / n**2)

    def mean(self, x0: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """(1 - t) x0 + t y, at every t_max: dividing t by t_max would contradict the drift."""
        t = over_frequency(t, x0)
        return x0 + t * (y - x0)

    def std(self, t: Tensor) -> Tensor:
        """sigma(t), by the closed form above; 0 at t = 0 and at t = 1.

        The difference of the two Ei is taken term by term with expm1 and log1p, so that nothing
        cancels at small t; float32 times are computed in float64 where the device has it.
        """
        work = torch.float32 if t.device.type == "mps" else torch.float64
        u = t.to(work)
        log_rest = torch.log1p(-u)  # ln(1 - t)
        n = torch.arange(1, len(self._series) + 1, device=u.device, dtype=work)
        series = torch.tensor(self._series, device=u.device, dtype=work)
        difference = (series * torch.expm1(n * log_rest.unsqueeze(-1))).sum(-1)
        rest_times_ei = torch.special.xlog1py(1 - u, -u) + (1 - u) * difference
        bracket = torch.expm1(2 * self.log_k * u) + u + 2 * self.k**2 * self.log_k * rest_times_ei
        variance = (self.c**2 * (1 - u) * bracket).clamp_min(0)
        return variance.sqrt().to(t.dtype)

    def drift(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """(y - x) / (1 - t)."""
        return (y - x) / (1 - over_frequency(t, x))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = c k^t."""
        return self.c * torch.exp(self.log_k * t)

    def denoised(self, xt: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """(xt - t y) / (1 - t)."""
        t = over_frequency(t, xt)
        return (xt - t * y) / (1 - t)


class OUVE:
    """Ornstein-Uhlenbeck SDE with exploding variance (Richter et al. 2023, eq. 8-12).

    f = gamma (Y - X), g(t) = smin (smax / smin)^t sqrt(2 L) with L = ln(smax / smin), mean
    e^{-gamma t} x0 + (1 - e^{-gamma t}) y, and

        sigma(t)^2 = smin^2 e^{-2 gamma t} (e^{2 (gamma + L) t} - 1) L / (gamma + L).
    """

    def __init__(self, gamma: float = 1.5, sigma_min: float = 0.05, sigma_max: float = 0.5) -> None:
        self.gamma, self.sigma_min, self.sigma_max = gamma, sigma_min, sigma_max
        self.log_ratio = math.log(sigma_max / sigma_min)

    def mean(self, x0: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """e^{-gamma t} x0 + (1 - e^{-gamma t}) y."""
        return x0 - torch.expm1(-self.gamma * over_frequency(t, x0)) * (y - x0)

    def std(self, t: Tensor) -> Tensor:
        """sigma(t), by the closed form above."""
        rate = self.gamma + self.log_ratio
        growth = torch.expm1(2 * rate * t) * (self.log_ratio / rate)
        return self.sigma_min * torch.exp(-self.gamma * t) * growth.sqrt()

    def drift(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """Return gamma (y - x), the same at every t."""
        return self.gamma * (y - x)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = smin (smax / smin)^t sqrt(2 L)."""
        scale = self.sigma_min * math.sqrt(2 * self.log_ratio)
        return scale * torch.exp(self.log_ratio * t)

    def denoised(self, xt: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """Y + e^{gamma t} (xt - y)."""
        return y + torch.exp(self.gamma * over_frequency(t, xt)) * (xt - y)


def over_frequency(t: Tensor, x: Tensor) -> Tensor:
    """Give per-frame values a frequency axis: t [B, Kb] beside x [B, F, Kb] becomes [B, 1, Kb]."""
    return t.unsqueeze(-2) if t.ndim == x.ndim - 1 and t.ndim > 0 else t
