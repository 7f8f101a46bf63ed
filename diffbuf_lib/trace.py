"""What `DiffusionBufferModel.trace` returns: every stage of one training batch, by name."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from diffbuf_lib.summary import Summary, summarise


@dataclass(frozen=True)
class Trace:
    """Every stage of one training batch; B examples, F bins, K frames, Kb of them in the buffer.

    Attributes:
        mix: [B, C, T], the noisy signal as it was given.
        target: [B, C, T], the clean signal as it was given.
        Y: [B, F, K] complex, compressed spectrum of the noisy signal.
        S: [B, F, K] complex, compressed spectrum of the clean signal.
        t: [B, Kb], diffusion times, rising.
        sigma: [B, Kb], standard deviation of the noise at t.
        z: [B, F, Kb] complex, the noise, CN(0, 1).
        V: [B, F, K] complex, the perturbed input.
        score: [B, F, Kb] complex, the network's estimate of grad log p.
        x0_hat: [B, F, Kb] complex, its estimate of S in the buffer.
        target_score: [B, F, Kb] complex, -z / sigma.
        loss_map: [B, F, Kb], the loss of every bin; with data prediction in units of
            model.data_scale^2, if that is given.
        loss: scalar, the mean of loss_map; with training.own_estimate the mean of that and of
            what the call before, on frames that have just entered, lost.
    """

    mix: Tensor
    target: Tensor
    Y: Tensor
    S: Tensor
    t: Tensor
    sigma: Tensor
    z: Tensor
    V: Tensor
    score: Tensor
    x0_hat: Tensor
    target_score: Tensor
    loss_map: Tensor
    loss: Tensor

    def summary(self) -> Summary:
        """Return shape, type, range, zeros, NaN and Inf of every stage; prints as a table."""
        return summarise({field.name: getattr(self, field.name) for field in fields(self)})
