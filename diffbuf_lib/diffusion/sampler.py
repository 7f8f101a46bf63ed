"""Online enhancement: the buffer moves one frame at a time, with one network call per frame.

Algorithm 1 of Lay, Makarov, Gerkmann 2025; with data prediction, arXiv 2510.18744.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib.diffusion.buffer import (
    Generators,
    complex_normal,
    next_times,
    renoise_step,
    reverse_step,
)
from diffbuf_lib.diffusion.level import RunningLevel
from diffbuf_lib.diffusion.sde import SDE
from diffbuf_lib.errors import ConfigError


@dataclass
class BufferState:
    """Everything that one stream remembers of its spectra.

    V and Y cover the same K frames: conditioning on any other window would be misaligned, or
    leak the future. With a streaming network, K is 1 + Kb.
    """

    V: Tensor  # [B, F, K] complex, perturbed; the last Kb frames are the buffer
    Y: Tensor  # [B, F, K] complex, noisy
    memory: Any = None  # what a streaming network keeps of all earlier frames
    pushed: int = 0  # frames taken in so far
    level: Tensor | None = None  # [B, 2], the sums of the running level, if there is one
    scales: Tensor | None = None  # [B, 1, Kb], what the buffer's frames were divided by


class BufferSampler:
    """Moves a buffer along a stream of noisy frames.

    Raises ConfigError for a delay outside [1, Kb], or below Kb without data prediction.
    """

    def __init__(
        self,
        # V, Y and t (and sigma and memory, for a streaming network) -> (score, x0_hat); see
        # `DiffusionBufferModel.denoise`.
        denoise: Callable[..., tuple[Tensor, Tensor]],
        sde: SDE,  # the one used in training
        t: Tensor,  # diffusion times of the buffer, [Kb], rising
        num_frames: int,  # K, frames that the network sees; at least Kb
        *,
        predicts_data: bool = False,  # whether x0_hat replaces the reverse step
        delay: int | None = None,  # d, frame that is output, 1 (the newest) to Kb (oldest, None)
        # For a streaming network: (F, times [B, Kb]) -> its memory. K is then ignored, since the
        # whole past counts. None: K frames are computed for each new one.
        start_memory: Callable[[int, Tensor], Any] | None = None,
        level: RunningLevel | None = None,  # frames are divided by it while they are inside
    ) -> None:
        Kb = t.shape[0]
        delay = Kb if delay is None else delay
        if not 1 <= delay <= Kb:
            raise ConfigError(f"delay {delay} is not between 1 and buffer_size {Kb}")
        if delay < Kb and not predicts_data:
            why = "a score model's estimate is ready only when it leaves the buffer"
            need = "a model trained with training.loss data_prediction"
            raise ConfigError(f"delay {delay} below buffer_size {Kb} needs {need}: {why}")
        self.denoise, self.sde, self.t, self.level = denoise, sde, t, level
        self.predicts_data, self.delay, self.start_memory = predicts_data, delay, start_memory
        self.num_frames = num_frames if start_memory is None else 1 + Kb
        # A stream's times never change: what follows from them is computed once.
        self.next_t = next_times(t)
        self.std, self.next_std = sde.std(t), sde.std(self.next_t)

    def start(
        self,
        batch: int,
        num_bins: int,
        generator: Generators = None,
        dtype: torch.dtype = torch.complex64,
    ) -> BufferState:
        """Begin `batch` streams with silence as their past.

        The buffer's slots hold sigma z, not zeros, as in training, where the buffer over a clip's
        leading zeros is noise. Between two steps slot i has reached t_{i-1}, since the next
        frame will shift it to slot i - 1.
        """
        Kb = self.t.shape[0]
        V = torch.zeros(batch, num_bins, self.num_frames, dtype=dtype, device=self.t.device)
        z = complex_normal((batch, num_bins, Kb), generator, self.t.device, dtype)
        V[..., -Kb:] = self.next_std * z
        memory = None
        if self.start_memory is not None:
            memory = self.start_memory(num_bins, self.t.expand(batch, -1))
        state = BufferState(V=V, Y=torch.zeros_like(V), memory=memory)
        if self.level is not None:
            state.level = V.real.new_zeros(batch, 2)
            state.scales = V.real.new_ones(batch, 1, Kb)
        return state

    def step(self, state: BufferState, R: Tensor, generator: Generators = None) -> Tensor:
        """Take in the newest noisy frame R, and return the frame `delay - 1` before it, clean.

        Both are [B, F] complex. The state is changed in place; the generator draws the frame's
        noise.
        """
        return self.move(state, R, self.draw(R, generator))

    def draw(self, R: Tensor, generator: Generators = None) -> Tensor:
        """Draw a step's noise, [B, F, Kb + 1]: the buffer's, then the new frame's."""
        shape = (*R.shape, self.t.shape[0] + 1)
        return complex_normal(shape, generator, R.device, R.dtype)

    def move(self, state: BufferState, R: Tensor, z: Tensor) -> Tensor:
        """Do what `step` does, with the noise of `draw`."""
        Kb = self.t.shape[0]
        if self.level is not None and state.level is not None and state.scales is not None:
            state.level, level = self.level.step(state.level, R)
            scale = self.level.scale(level)[:, None]  # [B, 1]
            state.scales = torch.cat([state.scales[..., 1:], scale.unsqueeze(-1)], dim=-1)
            R = R / scale
        entering = R + self.std[-1] * z[..., -1]
        state.V = torch.cat([state.V[..., 1:], entering.unsqueeze(-1)], dim=-1)
        state.Y = torch.cat([state.Y[..., 1:], R.unsqueeze(-1)], dim=-1)
        state.pushed += 1

        t = self.t.expand(R.shape[0], -1)
        if state.memory is None:
            score, x0_hat = self.denoise(state.V, state.Y, t)
        else:
            sigma = self.std.expand(R.shape[0], -1)
            score, x0_hat = self.denoise(state.V, state.Y, t, sigma, state.memory)
        x, y = state.V[..., -Kb:], state.Y[..., -Kb:]
        if self.predicts_data:
            moved = renoise_step(x0_hat, y, self.next_t, self.next_std, z[..., :-1], self.sde)
            out = x0_hat[..., Kb - self.delay]
        else:
            moved = reverse_step(x, y, score, self.t, z[..., :-1], self.sde)
            out = moved[..., 0]
        state.V = torch.cat([state.V[..., :-Kb], moved], dim=-1)
        if state.scales is not None:
            out = out * state.scales[..., Kb - self.delay]
        return out
