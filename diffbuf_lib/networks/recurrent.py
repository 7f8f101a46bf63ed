"""A recurrent trunk that hears Y frame by frame, and a small network for the buffer.

The trunk is a causal U-Net over frequency with recurrences along time: it remembers seconds at a
constant cost, and computes each frame once, as it enters. The buffer's network sees V, its times
and the trunk's features of all B frames at once, so its older frames have heard what follows
them. V of frames before the buffer is not used: online, it would be the network's own past
estimates, which training does not have.

So a clip can train as many buffers as fit in it (`diffusion_buffer.buffers`) with one trunk run.

Feature maps are [B, K, P, C], frames first; P positions of 4, 16, 64, ... bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.networks import layers
from diffbuf_lib.networks.block_causal import INPUT_CHANNELS, PATCH, STRIDE, ResBlock

Memory = dict[nn.Module, Tensor]  # what layers over time remember, changed in place; empty at first


@dataclass
class RecurrentState:
    """What streams keep between two frames."""

    memory: Memory  # of the trunk
    heard: Tensor  # [B, Kb, P, C], the trunk's features of the buffer's frames
    modulation: list[Tensor]  # of the buffer's blocks, [B, 1 + Kb, 1, 2 C]: the times are constant


class Recurrent(nn.Module):
    """The network described above. Arguments are keys of `ModelConfig`.

    channel_multipliers are for the trunk's levels; num_res_blocks and dropout are for the
    buffer's network, whose block i has its taps 2^i frames apart.
    """

    def __init__(
        self,
        base_channels: int = 48,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.trunk = Trunk(widths)
        self.embed_time = layers.FrameTimeEmbedding(base_channels, scale=1.0)
        self.first = layers.Regroup(INPUT_CHANNELS, widths[0], merge=PATCH)
        self.blocks = nn.ModuleList(
            ResBlock(widths[0], 4 * base_channels, 2**level, dropout)
            for level in range(num_res_blocks)
        )
        self.norm_out = nn.LayerNorm(widths[0])
        self.last = layers.Regroup(widths[0], 2, split=PATCH, zero=True)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        return cls(cfg.base_channels, cfg.channel_multipliers, cfg.num_res_blocks, cfg.dropout)

    def hear(self, y: Tensor) -> Tensor:
        """Return the trunk's features of Y [B, 2, F, K], which calls with the same Y can share."""
        heard: Tensor = self.trunk(self._padded(y)[0], {})
        return heard

    def forward(
        self, x: Tensor, t: Tensor, buffers: int = 1, heard: Tensor | None = None
    ) -> Tensor:
        """Map x [B, 4, F, K] and t [B, N Kb] to [B, 2, F, N Kb]; see `diffbuf_lib.networks`.

        The last frames are N buffers side by side, none of which sees another.
        """
        heard = self.hear(x[:, 2:]) if heard is None else heard
        x, bins = self._padded(x)
        B, n = t.shape

        def each(frames: Tensor) -> Tensor:  # [B, N Kb, ...] to [B N, Kb, ...]
            return frames[:, -n:].reshape(B * buffers, n // buffers, *frames.shape[2:])

        modulation = layers.modulations(self.embed_time, self.blocks, t.reshape(B * buffers, -1))
        out = self._buffer(each(x), each(heard), modulation)
        return out.reshape(B, n, *out.shape[2:])[:, :, :bins].permute(0, 3, 2, 1)

    @torch.no_grad()
    def start(
        self, num_bins: int, t: Tensor, *, compiled: bool = False, precision: str = "fp32"
    ) -> RecurrentState:
        """Begin B streams, with a buffer of silence; see `StreamingNetwork`."""
        if compiled or precision != "fp32":
            raise ConfigError("model.name recurrent streams only in fp32, uncompiled: leave it out")
        silence, _ = self._padded(t.new_zeros(len(t), 4, num_bins, t.shape[-1]))
        memory: Memory = {}
        heard = self.trunk(silence[..., 2:], memory)
        return RecurrentState(memory, heard, layers.modulations(self.embed_time, self.blocks, t))

    def step(self, state: RecurrentState, x: Tensor) -> Tensor:
        """Run the trunk on the newest frame, then the buffer; see `StreamingNetwork`."""
        x, bins = self._padded(x)
        heard = self.trunk(x[:, -1:, :, 2:], state.memory)
        state.heard = torch.cat([state.heard[:, 1:], heard], dim=1)
        out = self._buffer(x[:, 1:], state.heard, state.modulation)
        return out[:, :, :bins].permute(0, 3, 2, 1)

    def _padded(self, x: Tensor) -> tuple[Tensor, int]:
        """Return [B, K, F', 4], F' a multiple of the coarsest level's bins, and F."""
        bins = x.shape[2]
        return F.pad(x.permute(0, 3, 2, 1), (0, 0, 0, -bins % self.trunk.bins_step)), bins

    def _buffer(self, x: Tensor, heard: Tensor, modulation: list[Tensor]) -> Tensor:
        """Map V and Y [B, Kb, F, 4] to the output [B, Kb, F, 2]."""
        h = self.first(torch.cat([x, layers.magnitudes(x)], dim=-1)) + heard
        for block, times in zip(self.blocks, modulation, strict=True):
            h = block(h, times, 0, None)
        out: Tensor = self.last(F.silu(self.norm_out(h)))
        return out


class Trunk(nn.Module):
    """A U-Net along frequency, causal along time, with levels of these widths, finest first."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.bins_step = PATCH * STRIDE ** (len(widths) - 1)
        self.first = layers.Regroup(4, widths[0], merge=PATCH)
        pairs = list(pairwise(widths))
        self.merge = nn.ModuleList(layers.Regroup(a, b, merge=STRIDE) for a, b in pairs)
        self.split = nn.ModuleList(layers.Regroup(b, a, split=STRIDE) for a, b in pairs)
        self.down = nn.ModuleList(CausalBlock(width, i > 0) for i, width in enumerate(widths))
        self.up = nn.ModuleList(CausalBlock(width, i > 0) for i, width in enumerate(widths[:-1]))

    def forward(self, y: Tensor, memory: Memory) -> Tensor:
        """Map K frames of Y, [B, K, F, 2], F a multiple of `bins_step`, to [B, K, P, C]."""
        B, K, bins, _ = y.shape
        where = torch.linspace(-1, 1, bins, device=y.device, dtype=y.dtype)[:, None]
        where = where.expand(B, K, -1, -1)
        h = self.first(torch.cat([y, layers.magnitudes(y), where], dim=-1))
        skips = []
        for block, merge in zip(self.down, [*self.merge, None], strict=True):
            h = block(h, memory)
            skips.append(h)
            h = h if merge is None else merge(h)
        for level in reversed(range(len(self.split))):
            h = self.up[level](self.split[level](h) + skips[level], memory)
        return h


class CausalBlock(nn.Module):
    """A residual block of two convolutions over this frame and the one before.

    A memory along time follows, if it `remembers`.
    """

    def __init__(self, channels: int, remembers: bool) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.conv_in = CausalConv(channels)
        self.conv_out = CausalConv(channels, zero=True)
        self.memory = LinearMemory(channels) if remembers else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Keep the shape [B, K, P, C]."""
        h = self.conv_in(F.silu(self.norm_in(x)), memory)
        x = x + self.conv_out(F.silu(self.norm_out(h)), memory)
        return x if self.memory is None else x + self.memory(x, memory)


class CausalConv(nn.Module):
    """A convolution over three positions of this frame and the frame before."""

    def __init__(self, channels: int, *, zero: bool = False) -> None:
        super().__init__()
        self.conv = layers.initialised(nn.Conv2d(channels, channels, (2, 3), padding=(0, 1)), zero)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Keep the shape [B, K, P, C]; the last frame is remembered."""
        before = memory.get(self)
        rows = torch.cat([torch.zeros_like(x[:, :1]) if before is None else before, x], dim=1)
        memory[self] = x[:, -1:]
        out: Tensor = self.conv(rows.permute(0, 3, 1, 2))  # channels-last in memory
        return out.permute(0, 2, 3, 1)


class LinearMemory(nn.Module):
    """A gated linear recurrence along time, h_k = a_k h_{k-1} + (1 - a_k) v_k, per channel.

    a and v are made of frame k alone (as in minGRU, Feng et al. 2024, arXiv 2410.01201), so only
    one multiplication has to wait for the frame before. Every position has its own state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.inputs = layers.linear(channels, 3 * channels)
        self.out = layers.linear(channels, channels, zero=True)
        frames = torch.logspace(0, 2.5, channels)  # time constants at the start: 16 ms to 5 s
        with torch.no_grad():
            self.inputs.bias[:channels] = torch.logit(torch.exp(-1 / frames))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Keep the shape [B, K, P, C]; h of the last frame, [B, P, C], is remembered in float32."""
        gate, value, shown = self.inputs(self.norm(x)).chunk(3, dim=-1)
        keep = torch.sigmoid(gate.float())
        new = (1 - keep) * value.float()
        h = memory.get(self, torch.zeros_like(new[:, 0]))
        heard = []
        for a, b in zip(keep.unbind(1), new.unbind(1), strict=True):
            h = torch.addcmul(b, a, h)
            heard.append(h)
        memory[self] = h
        out: Tensor = self.out(torch.stack(heard, dim=1) * F.silu(shown))
        return out
