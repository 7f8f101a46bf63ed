"""Samples in, samples out: the Diffusion Buffer on a stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbuf_lib.diffusion.sampler import BufferState
from diffbuf_lib.errors import ShapeError
from diffbuf_lib.model import DiffusionBufferModel, evaluating
from diffbuf_lib.networks import Precision


@dataclass
class StreamState:
    """All that a stream remembers between two pushes."""

    waiting: Tensor  # [B, n] samples that no frame has used up yet
    buffer: BufferState  # the diffusion buffer and its history
    overlap: Tensor  # [B, n_fft] sum of the windowed output frames that overlap the next one
    envelope: Tensor  # [n_fft] sum of their squared windows
    taken: int  # samples that were pushed
    given: int  # samples that came out
    to_drop: int  # output samples before the first input sample, still to be left out

    @property
    def num_bytes(self) -> int:
        """Memory of one batch of streams, bytes."""
        own = (self.waiting, self.overlap, self.envelope)
        return self.buffer.num_bytes + sum(tensor.nbytes for tensor in own)


class OnlineEnhancer:
    """Enhance a stream: push any number of samples, get back all that are ready.

    The output is that of `model.enhance` on the whole signal with the same noise, however the
    input is cut into pushes, and needs no future sample: a frame is analysed when its last
    sample has been pushed. After `flush` as many samples have come out as went in. A network that
    can remember its history does so: a frame then costs the same after an hour.

    Args:
        model: any DiffusionBufferModel; it is used in evaluation mode and left as it was.
        seed: of the diffusion noise, so that a stream can be repeated.
        delay: d, 1 to B frames, of a data-prediction model; None for B.
        batch: streams that run side by side.
        compiled: of a streaming network: run one compiled graph, which takes about a minute to
            make.
        precision: of a streaming network: "bf16" runs it in bfloat16.

    Raises:
        ConfigError: a delay, compiled or precision that the model cannot have.
    """

    def __init__(
        self,
        model: DiffusionBufferModel,
        seed: int = 0,
        delay: int | None = None,
        batch: int = 1,
        *,
        compiled: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        self.model, self.seed, self.batch = model, seed, batch
        self.spectral = model.framing
        self.sampler = model.sampler(delay, compiled=compiled, precision=precision)
        self.device = self.sampler.t.device
        self.reset()

    @property
    def latency_samples(self) -> int:
        """Samples to push before the first one comes out: d - 1 hops and the frames over it.

        Sample 0 is whole when the last frame that covers it has left the buffer. A sample can wait
        up to one hop longer than this, since output comes a hop at a time.
        """
        n_fft, hop = self.spectral.n_fft, self.spectral.hop_length
        first_frame = n_fft - n_fft // 2  # the rest of it is silence before sample 0
        last_frame = n_fft // 2 // hop  # over sample 0, counted from 0
        return first_frame + (last_frame + self.sampler.delay - 1) * hop

    def reset(self) -> None:
        """Forget the stream, and start the noise from the seed again."""
        spectral, dtype = self.spectral, self.sampler.t.dtype
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        past = spectral.n_fft // 2  # frames are centred: the first begins before the stream
        self.state = StreamState(
            waiting=torch.zeros(self.batch, past, device=self.device, dtype=dtype),
            buffer=self.sampler.start(
                self.batch, spectral.num_bins, self.generator, dtype.to_complex()
            ),
            overlap=torch.zeros(self.batch, spectral.n_fft, device=self.device, dtype=dtype),
            envelope=torch.zeros(spectral.n_fft, device=self.device, dtype=dtype),
            taken=0,
            given=0,
            to_drop=past,
        )

    def push(self, samples: Tensor) -> Tensor:
        """Take in samples and give out those that are ready.

        Args:
            samples: [T], or [batch, T], of any length, full scale 1.

        Returns:
            [T'] or [batch, T'], on the input's device; T' may be 0.

        Raises:
            ShapeError: not [T] or [batch, T].
        """
        rows = samples.unsqueeze(0) if samples.ndim == 1 else samples
        if rows.ndim != 2 or rows.shape[0] != self.batch:
            raise ShapeError(
                f"push takes [T] or [{self.batch}, T] samples, not {list(samples.shape)}: "
                "average the channels, or give OnlineEnhancer batch=..."
            )
        self.state.taken += rows.shape[-1]
        ready = self._advance(rows.to(self.device, self.sampler.t.dtype))
        out = ready.to(samples.device, samples.dtype)
        return out[0] if samples.ndim == 1 else out

    def flush(self) -> Tensor:
        """End the stream: give out what is still inside, and reset.

        Returns:
            [T'] (or [batch, T'] with several streams), so that the whole output is as long as
            the whole input.
        """
        state = self.state
        missing = state.taken - state.given
        hop = self.spectral.hop_length
        # Silence to a whole number of hops, one frame that ends after it, and the buffer's delay:
        # what `enhance` sees.
        tail = -state.taken % hop + self.spectral.n_fft
        silence = torch.zeros(self.batch, tail, device=self.device, dtype=state.overlap.dtype)
        ready = [self._advance(silence)]
        while state.given < state.taken:
            ready.append(self._advance(silence[:, :hop]))
        out = torch.cat(ready, dim=-1)[:, :missing]
        self.reset()
        return out[0] if self.batch == 1 else out

    @torch.inference_mode()
    def _advance(self, rows: Tensor) -> Tensor:
        """Analyse, enhance and synthesise every frame that has become whole."""
        state, spectral = self.state, self.spectral
        n_fft, hop = spectral.n_fft, spectral.hop_length
        state.waiting = torch.cat([state.waiting, rows], dim=-1)
        window = spectral.window.to(rows.dtype)
        ready = []
        start = 0
        with evaluating(self.model):
            while state.waiting.shape[-1] - start >= n_fft:
                frame = state.waiting[:, start : start + n_fft]
                start += hop
                R = spectral.compress(torch.fft.rfft(frame * window))
                clean = self.sampler.step(state.buffer, R, self.generator)
                if state.buffer.pushed >= self.sampler.delay:
                    ready.append(self._synthesise(clean, window))
        state.waiting = state.waiting[:, start:]
        out = torch.cat(ready, dim=-1) if ready else rows[:, :0]
        dropped = min(state.to_drop, out.shape[-1])
        state.to_drop -= dropped
        out = out[:, dropped:]
        state.given += out.shape[-1]
        return out

    def _synthesise(self, clean: Tensor, window: Tensor) -> Tensor:
        """Overlap-add one frame [B, F]; return the hop of samples that no later frame changes."""
        state, spectral = self.state, self.spectral
        hop = spectral.hop_length
        state.overlap += torch.fft.irfft(spectral.expand(clean), spectral.n_fft) * window
        state.envelope += window.square()
        done = spectral.normalise(state.overlap[:, :hop], state.envelope[:hop])
        state.overlap = F.pad(state.overlap[:, hop:], (0, hop))
        state.envelope = F.pad(state.envelope[hop:], (0, hop))
        return done
