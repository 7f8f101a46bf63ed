"""A U-Net whose history features never change, so that a stream computes each of them once.

Frames before the buffer (the history) see only frames before themselves. Frames of the buffer see
the history and the whole buffer. Strides are in frequency only and norms stay within a frame, so
nothing of a history frame depends on where the window ends: what the next frame needs of the past
is the input of every convolution over time at the last few history frames. With those kept in a
`History`, a new frame costs Kb + 1 frames (the buffer, and the frame that has just become
history) instead of K.

Feature maps in this module are [B, K, F, C] in memory, frames first: the frames that are kept,
joined or left out are then whole blocks of memory, and a norm over channels is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import ModelConfig
from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.networks import layers

INPUT_CHANNELS = 6  # with magnitudes, which linear layers would otherwise have to learn
PATCH = 4  # bins per step of the finest level
STRIDE = 4  # bins of a level per bin of the next
Past = list[tuple[Tensor, Tensor]]


@dataclass
class History:
    """What a stream keeps of its history, whatever its length."""

    # For every residual block, the inputs of its two convolutions over time at the last d history
    # frames, [B, d, F', C] each, where d is the dilation. Changed in place.
    past: Past
    # For every residual block, the shift and scale of its norm, [B, 1 + Kb, 1, 2 C]: history
    # at t = 0, then the buffer's times. Constant along a stream.
    modulation: list[Tensor]
    run: Callable[[Tensor, list[Tensor], Past], Tensor]  # runs a step
    precision: str = "fp32"  # of the steps


class BlockCausal(nn.Module):
    """U-Net with 3x3 convolutions, in which a history frame does not see the frame after it.

    Level i has 1 / (4 * 4^i) of the bins and a dilation of 2^i frames in time. At the coarsest
    level every buffer frame attends to all buffer frames of its bin, so that a buffer longer than
    the convolutions' reach is still seen whole. Skips are added, not concatenated.

    `forward` assumes zeros before its window, `start` endless silence (frames of V = Y = 0).
    The two agree exactly if the window covers all that a buffer frame can see, K - Kb >=
    `receptive_field`, and its frames from before the stream are silent. Arguments are keys of
    `ModelConfig`; a level has num_res_blocks on the way down, and again on the way up.
    """

    def __init__(
        self,
        base_channels: int = 48,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.bins_step = PATCH * STRIDE ** (len(widths) - 1)

        def blocks(level: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResBlock(widths[level], 4 * base_channels, 2**level, dropout)
                for _ in range(num_res_blocks)
            )

        # Smooth in t: at the usual scale of 16 two neighbouring times have nothing in common.
        self.embed_time = layers.FrameTimeEmbedding(base_channels, scale=1.0)
        self.first = layers.Regroup(INPUT_CHANNELS, widths[0], merge=PATCH)
        levels, pairs = range(len(widths)), list(pairwise(widths))
        self.down = nn.ModuleList(blocks(level) for level in levels)
        self.merge = nn.ModuleList(layers.Regroup(a, b, merge=STRIDE) for a, b in pairs)
        self.attention = BufferAttention(widths[-1])
        self.up = nn.ModuleList(blocks(level) for level in levels)
        self.split = nn.ModuleList(layers.Regroup(b, a, split=STRIDE) for a, b in pairs)
        self.norm_out = nn.LayerNorm(widths[0])
        self.last = layers.Regroup(widths[0], 2, split=PATCH, zero=True)

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> Self:
        """Make the network of `cfg.model`."""
        return cls(cfg.base_channels, cfg.channel_multipliers, cfg.num_res_blocks, cfg.dropout)

    @property
    def receptive_field(self) -> int:
        """History frames that a buffer frame sees."""
        return sum(2 * block.conv_in.dilation for block in self._blocks())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x [B, 4, F, K] and t [B, Kb] to [B, 2, F, Kb]; see `diffbuf_lib.networks`."""
        modulation = layers.modulations(self.embed_time, self._blocks(), t)
        return self._unet(x, modulation, x.shape[-1] - t.shape[-1], past=None)

    @torch.no_grad()
    def start(
        self, num_bins: int, t: Tensor, *, compiled: bool = False, precision: str = "fp32"
    ) -> History:
        """Begin B streams after endless silence; see `StreamingNetwork`.

        A frame takes some two hundred small operations. Compiling fuses norms, activations and
        copies into a few loops, and lays out every weight once as the convolutions need it. It
        takes about a minute and fixes the weights as they are now. The error of bfloat16 is about
        40 dB below the signal. Raises MissingExtraError if compiling finds no C++ compiler.
        """
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision {precision!r} is none of fp32, bf16")
        (B, Kb), modulation = t.shape, layers.modulations(self.embed_time, self._blocks(), t)
        rows = -(-num_bins // self.bins_step) * self.bins_step // PATCH
        past = []
        for level, block in self._levels():
            shape = (B, 2**level, rows // STRIDE**level, block.channels)
            past.append((modulation[0].new_zeros(shape), modulation[0].new_zeros(shape)))
        frames = self.receptive_field + Kb  # the buffer of silence leaves no trace
        silence = modulation[0].new_zeros(B, layers.IO_CHANNELS, num_bins, frames)
        self._unet(silence, modulation, self.receptive_field, past)  # more would not change it
        history = History(past, modulation, self._one_step, precision)
        if compiled:
            self._compile(history, silence[..., : 1 + Kb])
        return history

    def step(self, state: History, x: Tensor) -> Tensor:
        """Take one more frame into the history, and run the buffer; see `StreamingNetwork`."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=state.precision == "bf16"):
            return state.run(x, state.modulation, state.past)

    def _one_step(self, x: Tensor, modulation: list[Tensor], past: Past) -> Tensor:
        return self._unet(x, modulation, 1, past)

    def _compile(self, history: History, silence: Tensor) -> None:
        """Compile by running a step on a copy of the history."""
        history.run = torch.compile(self._one_step, dynamic=False)
        copies = [(first.clone(), second.clone()) for first, second in history.past]
        # With freezing, weights are constants that are packed once for the convolutions. As an
        # option of torch.compile, it comes too late: they are inputs of the graph by then.
        try:
            # In inference mode, as in a stream: for other tensors it would compile again.
            with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
                x = silence.clone(memory_format=torch.channels_last)
                self.step(replace(history, past=copies), x)
        except torch._inductor.exc.InvalidCxxCompiler as error:
            fix = "install one (Debian: apt-get install g++)"
            raise MissingExtraError(f"a compiled stream needs a C++ compiler: {fix}") from error

    def _unet(
        self, x: Tensor, modulation: list[Tensor], num_history: int, past: Past | None
    ) -> Tensor:
        """Run num_history history frames and the buffer; the same code for window and stream."""
        bins = x.shape[2]
        x = F.pad(x.permute(0, 3, 2, 1), (0, 0, 0, -bins % self.bins_step))  # [B, K, F, 4]
        x = torch.cat([x, layers.magnitudes(x)], dim=-1)  # [B, K, F, 6]
        # Blocks take their modulation and their past in the order in which they run.
        kept = iter(past) if past is not None else None
        times = iter(modulation)

        def run(blocks: nn.Module, h: Tensor) -> Tensor:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                h = block(h, next(times), num_history, next(kept) if kept is not None else None)
            return h

        h = run(self.down[0], self.first(x))
        skips = [h]
        for merge, blocks in zip(self.merge, self.down[1:], strict=True):
            h = run(blocks, merge(h))
            skips.append(h)
        h = run(self.up[-1], self.attention(h, num_history))
        for level in reversed(range(len(self.split))):
            h = run(self.up[level], self.split[level](h) + skips[level])
        out = self.last(F.silu(self.norm_out(h[:, num_history:])))  # [B, Kb, F, 2]
        return out[:, :, :bins].permute(0, 3, 2, 1)

    def _blocks(self) -> list[ResBlock]:
        return [block for _, block in self._levels()]

    def _levels(self) -> list[tuple[int, ResBlock]]:
        """(level, block) in the order in which they run."""
        stages: list[tuple[int, Any]] = [*enumerate(self.down), *reversed([*enumerate(self.up)])]
        return [(level, block) for level, blocks in stages for block in blocks]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, norm shifted and scaled by time, SiLU, convolution, plus the input.

    The convolutions' taps are `dilation` frames apart.
    """

    def __init__(self, channels: int, time_channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.channels = channels
        self.norm_in = nn.LayerNorm(channels)
        self.conv_in = layers.TimeConv(channels, dilation)
        self.time = layers.linear(time_channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = layers.TimeConv(channels, dilation, zero=True)

    def forward(
        self, x: Tensor, modulation: Tensor, num_history: int, past: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Keep the shape [B, K, F, C]; `modulation` as returned by `modulations`."""
        past_in, past_out = past if past is not None else (None, None)
        h = self.conv_in(F.silu(self.norm_in(x)), num_history, past_in)
        if num_history != 1:  # all history frames share one modulation
            history = modulation[:, :1].expand(-1, num_history, -1, -1)
            modulation = torch.cat([history, modulation[:, 1:]], dim=1)
        bias, gain = modulation.chunk(2, dim=-1)  # [B, K, 1, C]
        h = F.silu(torch.addcmul(bias, F.layer_norm(h, h.shape[-1:]), 1 + gain))
        h = self.conv_out(self.dropout(h), num_history, past_out)
        return x + h


class BufferAttention(nn.Module):
    """Every buffer frame attends to all buffer frames of its bin; history passes unchanged.

    Frames are told apart by the diffusion times in their features.
    """

    def __init__(self, channels: int, head_channels: int = 32) -> None:
        super().__init__()
        self.heads = layers.num_groups_for(channels, head_channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.qkv = layers.linear(channels, 3 * channels)
        self.out = layers.linear(channels, channels, zero=True)

    def forward(self, x: Tensor, num_history: int) -> Tensor:
        """Keep the shape [B, K, F, C]."""
        history, buffer = x[:, :num_history], x[:, num_history:]
        qkv = self.qkv(self.norm(buffer)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each [B * F, heads, Kb, C / heads]
        # Written out: for so few frames torch's fused attention is slower on a CPU, and its
        # backward pass in bfloat16 ten times slower.
        h = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        h = h.transpose(1, 2).flatten(2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return torch.cat([history, buffer + self.out(h)], dim=1)
