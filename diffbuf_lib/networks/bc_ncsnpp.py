"""The journal's network (arXiv 2510.18744): an NCSN++ that sees whole blocks of frames.

Every level halves bins and frames. Frames are grouped, from the window's end, into blocks that the
coarsest level merges into one frame (16 frames with four strides). A frame sees all of its own
block and of earlier ones, and nothing of later ones: convolutions over time look back, norms are
over all frames so far, and the U-Net joins the frames of a block on its way down.

So a buffer of one block is seen whole, and a stream can be exact: block boundaries repeat every 16
frames, so a `Stream` keeps 16 pasts, one for each position at which blocks may begin, and every
frame advances one of them by a block. A step costs the buffer and one block (two if the buffer is a
whole number of blocks) instead of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.networks import layers

TIME_FEATURES = 128  # random frequencies of the diffusion time


@dataclass
class Past:
    """What layers remember of the frames before a pass over whole blocks."""

    blocks: int  # in the pass; it advances `kept` by the first of them
    # A convolution's last input frames, or the sums of a norm. Empty at the beginning.
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass
class Stream:
    """What a stream keeps, whatever its length."""

    pasts: list[Past]  # i: for blocks whose last frame number is i modulo the block size
    recent: Tensor  # [B, 4, F, *], the last history frames, which belong to no past yet
    t: Tensor  # [B, Kb], the diffusion times of the buffer
    pushed: int = 0  # frames taken in so far


class BlockCausalNCSNpp(nn.Module):
    """U-Net with causal convolutions over time and strides in frequency and time.

    A level has half the bins and half the frames of the one before. Arguments are keys of
    `ModelConfig`.
    """

    def __init__(
        self,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2, 2),
        dropout: float = 0.0,
        history_time: float = 0.0,
    ) -> None:
        super().__init__()
        self.history_time = history_time
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        last = len(widths) - 1
        self.block = 2**last  # frames, and bins per step of the coarsest level

        self.embed_time = TimeEmbedding(TIME_FEATURES)
        self.first = CausalConv(layers.IO_CHANNELS, widths[0])
        self.down = nn.ModuleList(
            ResBlock(widths[i], widths[i + 1], i, dropout, "down") for i in range(last)
        )
        self.middle = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], last, dropout) for _ in range(2)
        )
        self.up = nn.ModuleList(
            ResBlock(2 * widths[i], widths[i - 1], i, dropout, "up") for i in range(last, 0, -1)
        )
        self.norm_out = CumulatedNorm(widths[0])
        self.conv_out = CausalConv(widths[0], layers.IO_CHANNELS)
        self.last = nn.Conv2d(layers.IO_CHANNELS, 2, 1)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        if cfg.num_res_blocks != 1:
            raise ConfigError("bc_ncsnpp has one residual block per level: model.num_res_blocks=1")
        return cls(cfg.base_channels, cfg.channel_multipliers, cfg.dropout, cfg.history_time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x [B, 4, F, K] and t [B, Kb] to [B, 2, F, Kb]; see `diffbuf_lib.networks`.

        x is padded with silence at the front, to whole blocks.
        """
        x = F.pad(x, (-x.shape[-1] % self.block, 0))
        return self._unet(x, t, None)

    @torch.no_grad()
    def start(
        self, num_bins: int, t: Tensor, *, compiled: bool = False, precision: str = "fp32"
    ) -> Stream:
        """Begin B streams; see `StreamingNetwork`.

        Step n gives what `forward` gives for a window of block - Kb % block frames of silence, the
        n frames of history so far and the buffer: the norms count frames from there on.
        """
        if compiled or precision != "fp32":
            raise ConfigError("streams of bc_ncsnpp cannot be compiled or bf16: leave it out")
        # The time convolution looks one frame ahead, so the block that advances a past must have a
        # history frame after it: one block more if the buffer is a whole number of blocks.
        blocks = t.shape[-1] // self.block + 2
        history = blocks * self.block - t.shape[-1]
        recent = self.last.weight.new_zeros(t.shape[0], layers.IO_CHANNELS, num_bins, history)
        return Stream([Past(blocks) for _ in range(self.block)], recent, t)

    def step(self, state: Stream, x: Tensor) -> Tensor:
        """Take one more frame into the history, and run the buffer; see `StreamingNetwork`."""
        past = state.pasts[state.pushed % self.block]
        state.pushed += 1
        state.recent = torch.cat([state.recent[..., 1:], x[..., :1]], dim=-1)
        window = torch.cat([state.recent, x[..., 1:]], dim=-1)
        return self._unet(window.contiguous(memory_format=torch.channels_last), state.t, past)

    def _unet(self, x: Tensor, t: Tensor, past: Past | None) -> Tensor:
        """Run whole blocks, the last Kb frames of which are the buffer."""
        bins, Kb = x.shape[2], t.shape[-1]
        x = F.pad(x, (0, 0, 0, -bins % self.block))
        # The time convolutions need one more frame on either side: history, or zeros.
        begun = int(past is not None and bool(past.kept))
        time = self.embed_time(layers.frame_times(t, x.shape[-1] + begun, self.history_time))
        time = F.pad(time, (1 - begun, 1))  # [B, E, 1 + K + 1]

        h = self.first(x, past)
        skips = []
        for block in self.down:
            h = block(h, time, past)
            skips.append(h)
        for block in self.middle:
            h = block(h, time, past)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), time, past)
        h = self.conv_out(F.silu(self.norm_out(h, past)), past)
        out: Tensor = self.last(h[:, :, :bins, -Kb:])
        return out


class TimeEmbedding(layers.FrameTimeEmbedding):
    """Random Fourier features of t itself, not of its logarithm; two linear layers, then SiLU."""

    def forward(self, t: Tensor) -> Tensor:
        """Map times [B, K] to [B, E, K]."""
        phase = 2 * torch.pi * t.unsqueeze(-1) * self.frequencies.to(t.dtype)
        features = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.hidden.weight.dtype)
        return F.silu(self.out(self.hidden(features))).transpose(1, 2)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, plus time, norm, SiLU, convolution, plus the input, over sqrt 2.

    "down" halves the bins before the first convolution and the frames in the second one; "up"
    doubles them there. The shortcut has its own convolution. A frame of the input covers 2^level
    frames of the clip.
    """

    def __init__(
        self, in_channels: int, out_channels: int, level: int, dropout: float, resample: str = ""
    ) -> None:
        super().__init__()
        conv: Any = CausalConvTranspose if resample == "up" else CausalConv
        stride = 2 if resample else 1
        self.norm_in = CumulatedNorm(in_channels)
        self.resample = layers.Resample(resample, frames=False) if resample else nn.Identity()
        self.conv_in = conv(in_channels, out_channels)
        self.time = nn.Conv1d(4 * TIME_FEATURES, out_channels, 3, stride=2**level)
        self.norm_out = CumulatedNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(out_channels, out_channels, stride)
        self.shortcut = conv(in_channels, out_channels, stride)

    def forward(self, x: Tensor, time: Tensor, past: Past | None) -> Tensor:
        """Map [B, C, F, K] and time [B, E, 1 + frames of the clip + 1] to [B, C', F', K']."""
        h = self.conv_in(self.resample(F.silu(self.norm_in(x, past))), past)
        h = h + self.time(time).unsqueeze(2)
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h, past))), past)
        shortcut: Tensor = self.shortcut(self.resample(x), past)
        return (shortcut + h) * 0.5**0.5


class CumulatedNorm(nn.Module):
    """Group normalisation over channels, frequency and all frames so far.

    Sums over frames are in float64: in float32, E[x^2] - mean^2 turns negative, and its root NaN,
    after a few thousand frames.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = layers.num_groups_for(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        """Keep the shape [B, C, F, K]."""
        groups = (x if x.dtype == torch.float64 else x.float()).unflatten(1, (self.groups, -1))
        variance, mean = torch.var_mean(groups, dim=(2, 3), correction=0)  # per frame: [B, G, K]
        variance, mean = variance.double(), mean.double()
        sums = torch.stack([mean, variance + mean**2, torch.ones_like(mean)]).cumsum(dim=-1)
        if past is not None:
            sums = sums + past.kept.get(self, 0)
            end = x.shape[-1] // past.blocks
            past.kept[self] = sums[..., end - 1 : end].clone()  # [3, B, G, 1]
        mean, square = sums[:2] / sums[2]
        scale = ((square - mean**2).clamp(min=0) + 1e-6).rsqrt()
        mean, scale = (of.to(groups.dtype)[:, :, None, None] for of in (mean, scale))
        out = ((groups - mean) * scale).flatten(1, 2)
        return (out * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class CausalConv(nn.Conv2d):
    """A 3x3 convolution over a frame and those before it; the outermost bins are repeated."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=(1, stride))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:  # type: ignore[override]
        """Map [B, C, F, K] to [B, C', F, K / stride]."""
        rows = _with_past(self, x, 3 - self.stride[1], past)
        return super().forward(F.pad(rows, (0, 0, 1, 1), mode="replicate"))


class CausalConvTranspose(nn.ConvTranspose2d):
    """Transpose of `CausalConv`: a frame affects itself and later ones; zeros outside the band.

    Written as a convolution, for which CPUs have a fast routine: with stride 2, it computes
    w[0] x[i] + w[2] x[i - 1] and w[1] x[i], which are then interleaved.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=(1, stride))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:  # type: ignore[override]
        """Map [B, C, F, K] to [B, C', F, stride * K]."""
        stride = self.stride[1]
        rows = _with_past(self, x, 2 // stride, past)
        w = self.weight.transpose(0, 1).flip(2, 3)  # [C', C, 3, 3], the last tap first
        if stride == 1:
            return F.conv2d(rows, w, self.bias, padding=(1, 0))
        kernel = torch.stack([w[..., ::2], F.pad(w[..., 1:2], (1, 0))], dim=1).flatten(0, 1)
        assert self.bias is not None
        out = F.conv2d(rows, kernel, self.bias.repeat_interleave(2), padding=(1, 0))
        return out.unflatten(1, (-1, 2)).movedim(2, -1).flatten(3)


def _with_past(layer: nn.Module, x: Tensor, frames: int, past: Past | None) -> Tensor:
    """Prepend to x [B, C, F, K] the frames before it; zeros at the beginning."""
    before = None if past is None else past.kept.get(layer)
    rows = F.pad(x, (frames, 0)) if before is None else torch.cat([before, x], dim=-1)
    if past is not None:
        end = x.shape[-1] // past.blocks
        past.kept[layer] = rows[..., end : end + frames].clone()
    return rows
