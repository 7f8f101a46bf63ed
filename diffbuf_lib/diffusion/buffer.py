"""The buffer: rising diffusion times over the last B of K frames.

Lay, Makarov, Gerkmann 2025, section 3: V[k] = S[k] for k < K - B, and
(1 - t) S + t Y + sigma(t) z at the frame's own time t for the last B frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.config import DiffusionBufferConfig
from diffbuf_lib.diffusion.sde import SDE, over_frequency
from diffbuf_lib.errors import ShapeError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where randomness comes from: the global state, one generator, or one for each example."""


def perturb(x0: Tensor, y: Tensor, t: Tensor, z: Tensor, sde: SDE) -> Tensor:
    """Return the perturbed input V: x0 before the buffer, mean + sigma z within it.

    V, x0 (clean, S) and y (noisy) are [B, F, K] complex. For the last Kb frames, t [B, Kb] are the
    diffusion times, rising, and z [B, F, Kb] complex is CN(0, 1) noise: total variance 1, half in
    each part. Raises ShapeError if the shapes do not match.
    """
    Kb = t.shape[-1]
    if x0.shape != y.shape or z.shape != (*x0.shape[:-1], Kb) or not 1 <= Kb <= x0.shape[-1]:
        x0_y = f"x0 {list(x0.shape)} and y {list(y.shape)} must both be [B, F, K]"
        z_t = f"z {list(z.shape)} [B, F, Kb] and t {list(t.shape)} [B, Kb]"
        raise ShapeError(f"{x0_y}, {z_t}, with 1 <= Kb <= K")
    V = x0.clone()
    buffer = V[..., -Kb:]
    buffer.copy_(sde.mean(x0[..., -Kb:], y[..., -Kb:], t))
    buffer.add_(over_frequency(sde.std(t), z) * z)
    return V


def draw_times(
    cfg: DiffusionBufferConfig,
    batch: int,
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the diffusion times of a training batch, [batch, N B], rising along each buffer.

    "random": t_1 = t_eps and the other B - 1 uniform on [t_eps, t_max], sorted; "linspace": the
    times of inference.
    """
    if cfg.time_sampling == "linspace":
        return inference_times(cfg, device, dtype).repeat(cfg.buffers).expand(batch, -1)
    shape = (batch, cfg.buffers, cfg.buffer_size)
    u = draw(torch.rand, shape, generator, device=device, dtype=dtype)
    u[..., 0] = 0
    return (cfg.t_eps + (cfg.t_max - cfg.t_eps) * u).sort(dim=-1).values.flatten(1)


def inference_times(
    cfg: DiffusionBufferConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return t_1 = t_eps to t_B = t_max in equal steps, [B]."""
    return torch.linspace(cfg.t_eps, cfg.t_max, cfg.buffer_size, device=device, dtype=dtype)


def next_times(t: Tensor) -> Tensor:
    """Return the times [Kb] that a step takes the buffer to: 0, t_1, ..., t_{B-1}."""
    return torch.cat([t.new_zeros(1), t[:-1]])


def complex_normal(
    shape: tuple[int, ...],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.complex64,
) -> Tensor:
    """Draw CN(0, 1): total variance 1 (1/2 in each part), as torch.randn does for complex types.

    A sequence of generators must be on the device, one for each of the B examples of [B, ...].
    """
    return draw(torch.randn, shape, generator, device=device, dtype=dtype)


def reverse_step(x: Tensor, y: Tensor, score: Tensor, t: Tensor, z: Tensor, sde: SDE) -> Tensor:
    """Take every buffer frame from t_i to t_{i-1} by Euler-Maruyama, with t_0 = 0.

    X <- X - (f - g^2 score) dt + g sqrt(dt) z, dt = t_i - t_{i-1}; no noise in the step to t = 0
    (Lay et al. 2025, algorithm 1). The buffer x, the noisy y of the same frames, the score and
    z, CN(0, 1), whose first frame is not used, are [B, F, Kb] complex; t is [Kb], rising.
    """
    dt = t - next_times(t)
    g = sde.diffusion(t)
    noise_scale = g * dt.sqrt()
    noise_scale[0] = 0
    return x - (sde.drift(x, y, t) - g**2 * score) * dt + noise_scale * z


def renoise_step(
    x0_hat: Tensor, y: Tensor, t: Tensor, sigma: Tensor, z: Tensor, sde: SDE
) -> Tensor:
    """Bring the estimate x0_hat of every buffer frame to the frame's next time.

    (1 - t) x0_hat + t Y + sigma z (Lay et al. 2025, arXiv 2510.18744: data prediction). x0_hat, the
    noisy y of the same frames and z, CN(0, 1), are [B, F, Kb] complex. The target times t [Kb] are
    `next_times` of those at which the estimates were made; sigma [Kb] is `sde.std(t)`, which a
    stream computes once, since its times never change.
    """
    return sde.mean(x0_hat, y, t) + sigma * z


def draw(
    sample: Callable[..., Tensor], shape: tuple[int, ...], generator: Generators, **kind: Any
) -> Tensor:
    """Draw with torch.rand or torch.randn; `kind` is device and dtype, see `complex_normal`."""
    if generator is None or isinstance(generator, torch.Generator):
        return sample(shape, generator=generator, **kind)
    if len(generator) != shape[0]:
        raise ShapeError(f"{len(generator)} generators were given for a batch of {shape[0]}")
    return torch.stack([sample(shape[1:], generator=each, **kind) for each in generator])
