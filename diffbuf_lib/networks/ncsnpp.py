"""NCSN++ as the Diffusion Buffer uses it: a U-Net that knows the diffusion time of every frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.networks import layers


class NCSNpp(nn.Module):
    """The noise-conditional U-Net of Song et al. 2021 as reduced by Lay et al. 2025.

    With 96 channels, multipliers (1, 2, 2, 2) and one residual block per level it has 18.28 M
    parameters. A pyramid of the resampled input is added to the features of every level, and a
    pyramid of outputs is summed from the coarsest level up. The time embedding is a sequence over
    frames, brought to each level's frame rate by a strided convolution. Arguments are keys of
    `ModelConfig`; a level has one residual block more on the way up than on the way down.
    `divide_by_time` divides by t before the last layer, whose bias is thus not divided; history
    frames are given the time `history_time`.
    """

    def __init__(
        self,
        base_channels: int = 96,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 1,
        dropout: float = 0.0,
        *,
        divide_by_time: bool = False,
        history_time: float = 0.0,
    ) -> None:
        super().__init__()
        self.divide_by_time, self.history_time = divide_by_time, history_time
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.stride = 2 ** (len(widths) - 1)  # frames and bins per step of the coarsest level

        def block(in_channels: int, out_channels: int, level: int, resample: str = "") -> ResBlock:
            sizes = (in_channels, out_channels, 4 * base_channels)
            return ResBlock(*sizes, 2**level, resample, dropout)

        self.embed_time = layers.FrameTimeEmbedding(base_channels)
        self.first = layers.conv(layers.IO_CHANNELS, base_channels)

        skips = [base_channels]  # channels of the skip connections to the way up
        width = base_channels
        self.down = nn.ModuleList()
        for level, next_width in enumerate(widths):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(block(width, next_width, level))
                width = next_width
                skips.append(width)
            shrink = None
            if level + 1 < len(widths):
                shrink = block(width, width, level + 1, "down")
                skips.append(width)
            self.down.append(DownStage(blocks, shrink, width))

        coarsest = len(widths) - 1
        self.middle_in = block(width, width, coarsest)
        self.attention = Attention(width)
        self.middle_out = block(width, width, coarsest)

        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(width + skips.pop(), widths[level], level))
                width = widths[level]
            grow = block(width, width, level - 1, "up") if level > 0 else None
            self.up.append(UpStage(blocks, grow, width))
        self.last = nn.Conv2d(layers.IO_CHANNELS, 2, 1)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        sizes = (cfg.base_channels, cfg.channel_multipliers, cfg.num_res_blocks, cfg.dropout)
        divide = cfg.output_scale == "time_inside"
        return cls(*sizes, divide_by_time=divide, history_time=cfg.history_time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x [B, 4, F, K] and t [B, Kb] to [B, 2, F, Kb]; see `diffbuf_lib.networks`."""
        (bins, frames), Kb = x.shape[2:], t.shape[-1]
        # Pad to whole steps of the coarsest level: zeros above the band and before the past, so
        # that the buffer stays at the end.
        x = F.pad(x, (-frames % self.stride, 0, 0, -bins % self.stride))
        time = self.embed_time(layers.frame_times(t, x.shape[-1], self.history_time))
        out = self._unet(x, time)[:, :, :bins, -Kb:]
        if self.divide_by_time:
            out = out / t[:, None, None]
        result: Tensor = self.last(out)
        return result

    def _unet(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x)
        skips = [h]
        for down in self.down:
            h, x, features = down(h, x, time)
            skips += features
        h = self.middle_out(self.attention(self.middle_in(h, time)), time)
        out: Tensor | None = None
        for up in self.up:
            h, out = up(h, out, skips, time)
        assert out is not None
        return out


class DownStage(nn.Module):
    """One level on the way down: residual blocks, then half the bins and frames, if `shrink`."""

    def __init__(self, blocks: list[ResBlock], shrink: ResBlock | None, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shrink = shrink
        self.downsample = layers.Resample("down") if shrink else None
        self.add_input = layers.conv(layers.IO_CHANNELS, width, 1) if shrink else None

    def forward(self, h: Tensor, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the features, the input at the next level's size, and the skip features."""
        features = []
        for block in self.blocks:
            h = block(h, time)
            features.append(h)
        if self.shrink and self.downsample and self.add_input:
            x = self.downsample(x)
            h = self.shrink(h, time) + self.add_input(x)
            features.append(h)
        return h, x, features


class UpStage(nn.Module):
    """One level on the way up: blocks with skips, a term of the output, then twice the size."""

    def __init__(self, blocks: list[ResBlock], grow: ResBlock | None, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grow = grow
        self.upsample = layers.Resample("up")
        self.norm_out = layers.NormAct(width)
        self.conv_out = layers.conv(width, layers.IO_CHANNELS, zero=True)

    def forward(
        self, h: Tensor, out: Tensor | None, skips: list[Tensor], time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the sum of outputs so far; pops its skips from the list."""
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), time)
        term = self.conv_out(self.norm_out(h))
        out = term if out is None else self.upsample(out) + term
        return (self.grow(h, time) if self.grow else h), out


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, plus time, norm, SiLU, convolution, plus the input, over sqrt 2.

    The residual block of BigGAN in Song et al. 2021: resampling ("down", "up" or nothing) comes
    after the first activation and on the shortcut. A frame of the output covers `time_stride`
    frames of the clip.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, time_stride: int,
        resample: str, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_in = layers.NormAct(in_channels)
        self.resample = layers.Resample(resample) if resample else nn.Identity()
        self.conv_in = layers.conv(in_channels, out_channels)
        self.time = nn.Conv1d(time_channels, out_channels, 3, stride=time_stride, padding=1)
        self.norm_out = layers.NormAct(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = layers.conv(out_channels, out_channels, zero=True)
        same = in_channels == out_channels and not resample
        self.shortcut = nn.Identity() if same else layers.conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map [B, C, F, K] and time [B, E, K of the clip] to [B, C', F', K']."""
        h = self.conv_in(self.resample(self.norm_in(x)))
        h = h + self.time(time).unsqueeze(2)
        h = self.conv_out(self.dropout(self.norm_out(h)))
        return (self.shortcut(self.resample(x)) + h) * math.sqrt(0.5)


class Attention(nn.Module):
    """Self-attention over all bins and frames of the coarsest level, plus the input, over sqrt 2.

    One head (Song et al. 2021).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(layers.num_groups_for(channels), channels, eps=1e-6)
        self.qkv = layers.conv(channels, 3 * channels, 1)
        self.out = layers.conv(channels, channels, 1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [B, C, F, K]."""
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, F * K, 3 C]
        q, k, v = tokens.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return (x + self.out(h.transpose(1, 2).unflatten(2, x.shape[2:]))) * math.sqrt(0.5)
