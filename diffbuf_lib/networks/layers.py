"""Building blocks of the networks. Feature maps are [B, C, F, K]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IO_CHANNELS = 4  # real and imaginary parts of V and Y
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class FrameTimeEmbedding(nn.Module):
    """Embed the diffusion time of every frame.

    Random Fourier features of log(t + 0.01) (Song et al. 2021, appendix C), then two linear
    layers. History frames have t = 0, which the offset keeps finite. `scale` is the frequencies'
    standard deviation, in cycles per nat.
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
        """Map times [B, K] to [B, 4 * num_features, K]."""
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


def frame_times(t: Tensor, num_frames: int, history: float = 0.0) -> Tensor:
    """Return every frame's time, [B, K]: the buffer's times [B, Kb], and `history` before them."""
    return F.pad(t, (num_frames - t.shape[-1], 0), value=history)


def num_groups_for(channels: int, each: int = 4, most: int = 32) -> int:
    """Return the number of equal groups of `channels`, with at least `each` in one if possible."""
    wanted = min(max(channels // each, 1), most)
    return next(groups for groups in range(wanted, 0, -1) if channels % groups == 0)


def conv(in_channels: int, out_channels: int, size: int = 3, *, zero: bool = False) -> nn.Conv2d:
    """Make a convolution that keeps the size; `zero` starts the block as the identity."""
    return initialised(nn.Conv2d(in_channels, out_channels, size, padding=size // 2), zero)


def linear(in_channels: int, out_channels: int, *, zero: bool = False) -> nn.Linear:
    """Make a linear layer over the last axis; `zero` starts it as zero."""
    return initialised(nn.Linear(in_channels, out_channels), zero)


def initialised(layer: Layer, zero: bool) -> Layer:
    """Start a layer's weights as zero, or by Xavier's rule, and its biases as zero."""
    (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Resample(nn.Module):
    """Halve or double bins, and frames if `frames`, with the FIR filter [1, 3, 3, 1] / 8 in each.

    The filter of NCSN++ (Song et al. 2021), as one depthwise strided convolution: the usual,
    general up-fir-down routine in plain torch would cost nearly half of a forward pass.
    The direction is "down" or "up".
    """

    kernel: Tensor

    def __init__(self, direction: str, *, frames: bool = True) -> None:
        super().__init__()
        self.direction = direction
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(taps, taps) if frames else taps[:, None]
        self.stride, self.padding = ((2, 2), (1, 1)) if frames else ((2, 1), (1, 0))
        gain = 1 if direction == "down" else math.prod(self.stride)  # for the zeros between samples
        self.register_buffer("kernel", gain * kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, K] to [B, C, F / 2, K / 2], or to [B, C, 2 F, 2 K]."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        resample = F.conv2d if self.direction == "down" else F.conv_transpose2d
        out: Tensor = resample(x, kernel, stride=self.stride, padding=self.padding, groups=channels)
        return out


class TimeConv(nn.Module):
    """A 3x3 convolution over frames and bins, causal in the history.

    A buffer frame k sees frames k - d, k and k + d, with zeros after the buffer; a history frame
    sees k - d and k with the same weights, and zeros for the third. Features are [B, K, F, C].

    The three frames are laid side by side as channels, so that one convolution over bins serves
    both kinds of frame: masking is exact, and in small maps this is faster than a (dilated) 3x3
    convolution followed by a causal one.

    `channels` is that of both input and output; `zero` initialises the layer to zero.
    """

    def __init__(self, channels: int, dilation: int, *, zero: bool = False) -> None:
        super().__init__()
        self.dilation = dilation
        conv = nn.Conv2d(3 * channels, channels, (1, 3), padding=(0, 1))
        self.over_bins = initialised(conv, zero)

    def forward(self, x: Tensor, num_history: int = 0, past: Tensor | None = None) -> Tensor:
        """Keep the shape [B, K, F, C] of num_history history frames and the buffer.

        `past` is [B, d, F, C], the history frames before x, changed in place to those before the
        buffer; None: zeros.
        """
        d, K = self.dilation, x.shape[1]
        none = x.new_zeros(x.shape[0], d, *x.shape[2:])
        rows = torch.cat([none if past is None else past, x, none], dim=1)  # [B, d + K + d, F, C]
        # What follows a history frame is hidden from it.
        following = F.pad(rows[:, num_history + 2 * d :], (0, 0, 0, 0, num_history, 0))
        taps = torch.cat([rows[:, :K], x, following], dim=-1)  # [B, K, F, 3 C]
        if past is not None:
            past.copy_(rows[:, num_history : num_history + d])
        out: Tensor = self.over_bins(taps.permute(0, 3, 1, 2))  # channels-last in memory
        return out.permute(0, 2, 3, 1)


class Regroup(nn.Module):
    """A linear layer from every `merge` bins to `split` bins: [B, K, F, C] to [B, K, F', C']."""

    def __init__(
        self, in_channels: int, out_channels: int, *, merge: int = 1, split: int = 1,
        zero: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.merge, self.split = merge, split
        self.mix = linear(merge * in_channels, split * out_channels, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        """Join the channels of the bins, and mix them."""
        B, K, bins, _ = x.shape
        rows = bins // self.merge
        out: Tensor = self.mix(x.reshape(B, K, rows, -1)).reshape(B, K, rows * self.split, -1)
        return out


def modulations(embed: FrameTimeEmbedding, blocks: Iterable[Any], t: Tensor) -> list[Tensor]:
    """Return each block's modulation by t [B, Kb]: [B, 1 + Kb, 1, 2 C], of history, then buffer."""
    time = embed(F.pad(t, (1, 0))).transpose(1, 2)  # [B, 1 + Kb, E]
    return [block.time(time).unsqueeze(2) for block in blocks]


def magnitudes(x: Tensor) -> Tensor:
    """Return the magnitudes of [..., 2 n], real and imaginary parts in turn: [..., n].

    Smooth at zero, so that it has a gradient there.
    """
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    real, imag = x[..., 0::2], x[..., 1::2]
    return (real * real + imag * imag + tiny).sqrt()
