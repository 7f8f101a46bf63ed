"""A recurrent trunk that hears Y frame by frame, and a small network for the buffer.

The trunk is a causal U-Net over frequency with recurrences along time: it remembers seconds at a
constant cost, and computes each frame once, as it enters. The buffer's network sees V, its times
and the trunk's features of all B frames at once, so its older frames have heard what follows
them. V of frames before the buffer is not looked at: online that would be the network's own past
estimates, which training does not have.

So a clip trains as many buffers as fit in it (`diffusion_buffer.buffers`): the trunk runs once.

Feature maps are [B, K, P, C], frames first; P positions of 4, 16, 64, ... bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.networks.block_causal import PATCH, STRIDE, ResBlock
from diffbuf_lib.networks.layers import (
    FrameTimeEmbedding,
    Merge,
    Split,
    initialised,
    linear,
    magnitudes,
)

Memory = list[Tensor]
"""What a trunk remembers: of each layer over time, in the order in which they run."""


@dataclass
class RecurrentState:
    """What streams keep between two frames."""

    memory: Memory  # of the trunk
    heard: Tensor  # [B, Kb, P, C], the trunk's features of the buffer's frames
    modulation: list[Tensor]  # of the buffer's blocks, [B, 1 + Kb, 1, 2 C]: the times are constant

    @property
    def num_bytes(self) -> int:
        """Memory, bytes."""
        return sum(tensor.nbytes for tensor in (*self.memory, self.heard, *self.modulation))


class Recurrent(nn.Module):
    """See the module.

    Args:
        base_channels: channels of the finest level, and of the buffer's network.
        channel_multipliers: channels of each of the trunk's levels over base_channels.
        num_res_blocks: of the buffer's network; block i has its taps 2^i frames apart.
        dropout: probability, in the buffer's blocks.
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
        self.embed_time = FrameTimeEmbedding(base_channels, scale=1.0)
        self.first = Merge(6, widths[0], PATCH)
        self.blocks = nn.ModuleList(
            ResBlock(widths[0], 4 * base_channels, 2**level, dropout)
            for level in range(num_res_blocks)
        )
        self.norm_out = nn.LayerNorm(widths[0])
        self.last = Split(widths[0], 2, PATCH, zero=True)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        return cls(cfg.base_channels, cfg.channel_multipliers, cfg.num_res_blocks, cfg.dropout)

    def forward(self, x: Tensor, t: Tensor, buffers: int = 1) -> Tensor:
        """Run the trunk over all frames, and the buffers that the last of them are.

        Args:
            x: [B, 4, F, K]: V.real, V.imag, Y.real, Y.imag.
            t: [B, N Kb], the diffusion times of the last N Kb frames.
            buffers: N, buffers side by side; none sees another.

        Returns:
            [B, 2, F, N Kb].
        """
        x, bins = self._padded(x)
        heard, _ = self.trunk(x[..., 2:], None)
        B, n = t.shape

        def each(frames: Tensor) -> Tensor:  # [B, N Kb, ...] to [B N, Kb, ...]
            return frames[:, -n:].reshape(B * buffers, n // buffers, *frames.shape[2:])

        modulation = self._modulation(t.reshape(B * buffers, -1))
        out = self._buffer(each(x), each(heard), modulation)
        return out.reshape(B, n, *out.shape[2:])[:, :, :bins].permute(0, 3, 2, 1)

    @torch.no_grad()
    def start(
        self, num_bins: int, t: Tensor, *, compiled: bool = False, precision: str = "fp32"
    ) -> RecurrentState:
        """Begin B streams, with a buffer of silence; see `StreamingNetwork`."""
        if compiled or precision != "fp32":
            raise ConfigError("model.name recurrent streams in fp32 and not compiled: leave it out")
        silence, _ = self._padded(t.new_zeros(len(t), 4, num_bins, t.shape[-1]))
        heard, memory = self.trunk(silence[..., 2:], None)
        return RecurrentState(memory, heard, self._modulation(t))

    def step(self, state: RecurrentState, x: Tensor) -> Tensor:
        """Hear the newest frame, and run the buffer; see `StreamingNetwork`."""
        x, bins = self._padded(x)
        heard, state.memory = self.trunk(x[:, -1:, :, 2:], state.memory)
        state.heard = torch.cat([state.heard[:, 1:], heard], dim=1)
        out = self._buffer(x[:, 1:], state.heard, state.modulation)
        return out[:, :, :bins].permute(0, 3, 2, 1)

    def _padded(self, x: Tensor) -> tuple[Tensor, int]:
        """Return [B, K, F', 4], F' a multiple of the coarsest level's bins, and F."""
        bins = x.shape[2]
        return F.pad(x.permute(0, 3, 2, 1), (0, 0, 0, -bins % self.trunk.bins_step)), bins

    def _modulation(self, t: Tensor) -> list[Tensor]:
        """Return each block's [B, 1 + Kb, 1, 2 C]; blocks pass over the first, history's."""
        time = self.embed_time(F.pad(t, (1, 0))).transpose(1, 2)
        blocks: Iterable[Any] = self.blocks
        return [block.time(time).unsqueeze(2) for block in blocks]

    def _buffer(self, x: Tensor, heard: Tensor, modulation: list[Tensor]) -> Tensor:
        """Take V and Y [B, Kb, F, 4] to the output [B, Kb, F, 2]."""
        h = self.first(torch.cat([x, magnitudes(x)], dim=-1)) + heard
        for block, times in zip(self.blocks, modulation, strict=True):
            h = block(h, times, 0, None)
        out: Tensor = self.last(F.silu(self.norm_out(h)))
        return out


class Trunk(nn.Module):
    """A U-Net along frequency, causal along time.

    Args:
        widths: channels of every level, finest first.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.bins_step = PATCH * STRIDE ** (len(widths) - 1)
        self.first = Merge(4, widths[0], PATCH)
        pairs = list(pairwise(widths))
        self.merge = nn.ModuleList(Merge(fine, coarse, STRIDE) for fine, coarse in pairs)
        self.split = nn.ModuleList(Split(coarse, fine, STRIDE) for fine, coarse in pairs)
        self.down = nn.ModuleList(CausalBlock(width, level > 0) for level, width in
                                  enumerate(widths))  # fmt: skip
        self.up = nn.ModuleList(CausalBlock(width, level > 0) for level, width in
                                enumerate(widths[:-1]))  # fmt: skip

    def forward(self, y: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Hear K frames of Y.

        Args:
            y: [B, K, F, 2], real and imaginary part; F a multiple of `bins_step`.
            memory: from the call before; None: nothing was heard yet.

        Returns:
            (features [B, K, P, C], the new memory).
        """
        B, K, bins, _ = y.shape
        where = torch.linspace(-1, 1, bins, device=y.device, dtype=y.dtype)
        h = self.first(torch.cat([y, magnitudes(y), where[:, None].expand(B, K, -1, -1)], dim=-1))
        kept = iter(memory) if memory is not None else None
        new: Memory = []

        def run(block: Any, h: Tensor) -> Tensor:
            past = None if kept is None else [next(kept) for _ in range(block.num_kept)]
            h, past = block(h, past)
            new.extend(past)
            return h

        skips = []
        for block, merge in zip(self.down, [*self.merge, None], strict=True):
            h = run(block, h)
            skips.append(h)
            h = h if merge is None else merge(h)
        for level in reversed(range(len(self.split))):
            h = run(self.up[level], self.split[level](h) + skips[level])
        return h, new


class CausalBlock(nn.Module):
    """A residual block of two convolutions over this frame and the last, then memory along time.

    Args:
        channels: of input and output.
        remembers: whether there is a `LinearMemory`.
    """

    def __init__(self, channels: int, remembers: bool) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.conv_in = CausalConv(channels)
        self.conv_out = CausalConv(channels, zero=True)
        self.memory = LinearMemory(channels) if remembers else None
        self.num_kept = 3 if remembers else 2

    def forward(self, x: Tensor, past: Memory | None) -> tuple[Tensor, Memory]:
        """Keep the shape [B, K, P, C]; return what to remember too."""
        first, second, state = (*(past or ()), None, None, None)[:3]
        h, first = self.conv_in(F.silu(self.norm_in(x)), first)
        h, second = self.conv_out(F.silu(self.norm_out(h)), second)
        x = x + h
        if self.memory is None:
            return x, [first, second]
        h, state = self.memory(x, state)
        return x + h, [first, second, state]


class CausalConv(nn.Module):
    """A convolution over three positions of this frame and the frame before."""

    def __init__(self, channels: int, *, zero: bool = False) -> None:
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, (2, 3), padding=(0, 1)), zero)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep the shape [B, K, P, C]; `past` and what is returned with it: the last frame's."""
        past = torch.zeros_like(x[:, :1]) if past is None else past
        rows = torch.cat([past, x], dim=1)
        out: Tensor = self.conv(rows.permute(0, 3, 1, 2))  # channels-last in memory
        return out.permute(0, 2, 3, 1), rows[:, -1:]


class LinearMemory(nn.Module):
    """A gated linear recurrence along time, h_k = a_k h_{k-1} + (1 - a_k) v_k, per channel.

    a and v are made of frame k alone (as in minGRU, Feng et al. 2024, arXiv 2410.01201), so only
    one multiplication has to wait for the frame before. Every position has its own state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.inputs = linear(channels, 3 * channels)
        self.out = linear(channels, channels, zero=True)
        frames = torch.logspace(0, 2.5, channels)  # time constants at the start: 16 ms to 5 s
        with torch.no_grad():
            self.inputs.bias[:channels] = torch.logit(torch.exp(-1 / frames))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep the shape [B, K, P, C]; the state is [B, P, C], float32."""
        gate, value, shown = self.inputs(self.norm(x)).chunk(3, dim=-1)
        keep = torch.sigmoid(gate.float())
        new = (1 - keep) * value.float()
        h = torch.zeros_like(new[:, 0]) if state is None else state
        heard = []
        for a, b in zip(keep.unbind(1), new.unbind(1), strict=True):
            h = torch.addcmul(b, a, h)
            heard.append(h)
        out: Tensor = self.out(torch.stack(heard, dim=1) * F.silu(shown))
        return out, h
