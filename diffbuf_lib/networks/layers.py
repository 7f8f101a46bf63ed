"""What the networks are built of. Feature maps are [B, C, F, K], channels-last in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrameTimeEmbedding(nn.Module):
    """Embed the diffusion time of every frame.

    Random Fourier features of log(t + 0.01) (Song et al. 2021, appendix C), then two linear
    layers. History frames have t = 0, which the offset keeps finite.

    Args:
        num_features: random frequencies; the embedding has four times as many channels.
        scale: standard deviation of the frequencies, in cycles per nat.
    """

    frequencies: Tensor

    def __init__(self, num_features: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(num_features) * scale)
        width = 4 * num_features
        self.hidden = nn.Linear(2 * num_features, width)
        self.out = nn.Linear(width, width)
        for linear in (self.hidden, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Take times [B, K] to [B, 4 * num_features, K]."""
        # In float32 also under autocast: the phases reach hundreds of radians.
        phase = 2 * math.pi * torch.log(t.float() + 0.01).unsqueeze(-1) * self.frequencies.float()
        features = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features))).transpose(1, 2)


class NormAct(nn.GroupNorm):
    """Group normalisation over channels, frequency and frames, then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups_for(channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return F.silu(super().forward(x))


def frame_times(t: Tensor, num_frames: int) -> Tensor:
    """Give every frame its time: those of the buffer, [B, Kb], and 0 before it, [B, K]."""
    return F.pad(t, (num_frames - t.shape[-1], 0))


def num_groups_for(channels: int) -> int:
    """Return the groups of a GroupNorm: four channels each, 32 at most, dividing `channels`."""
    groups = min(max(channels // 4, 1), 32)
    while channels % groups:
        groups -= 1
    return groups


def conv3x3(in_channels: int, out_channels: int, *, zero: bool = False) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps the size; `zero` starts the block as the identity."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return _initialised(conv, zero)


def conv1x1(in_channels: int, out_channels: int, *, zero: bool = False) -> nn.Conv2d:
    """Make a 1x1 convolution."""
    return _initialised(nn.Conv2d(in_channels, out_channels, 1), zero)


def _initialised(conv: nn.Conv2d, zero: bool) -> nn.Conv2d:
    if zero:
        nn.init.zeros_(conv.weight)
    else:
        nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class Resample(nn.Module):
    """Halve or double frequency and frames with the FIR filter [1, 3, 3, 1] / 8 in each.

    The filter of NCSN++ (Song et al. 2021), as one depthwise strided convolution: the general
    up-fir-down routine in plain torch that is usual for it costs nearly half of a forward pass.

    Args:
        direction: "down" or "up".
    """

    kernel: Tensor

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        gain = 1 if direction == "down" else 4  # zeros between samples take 3/4 of the level
        self.register_buffer("kernel", gain * torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, K] to [B, C, F / 2, K / 2], or to [B, C, 2 F, 2 K]."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)
