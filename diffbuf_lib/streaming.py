"""Samples in, samples out: the Diffusion Buffer on a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffbuf_lib.diffusion.sampler import BufferSampler, BufferState
from diffbuf_lib.errors import ConfigError, ShapeError
from diffbuf_lib.graph import Backend, GraphSampler, cached_graph, tensors
from diffbuf_lib.model import DiffusionBufferModel, evaluating
from diffbuf_lib.networks import Precision


@dataclass
class StreamState:
    """Everything that a stream remembers between two pushes."""

    waiting: Tensor  # [B, n] samples that no frame has used up yet
    buffer: BufferState  # the diffusion buffer and its history
    overlap: Tensor  # [B, n_fft] sum of the windowed output frames that overlap the next one
    envelope: Tensor  # [n_fft] sum of their squared windows
    num_bad: Tensor  # [], pushed samples that were NaN or Inf, and taken as zeros
    given: int  # samples output; below 0: still dropping those before the first input sample
    taken: int = 0  # samples pushed

    @property
    def bad(self) -> int:
        """`num_bad` as a Python int; reading it waits for a GPU."""
        return int(self.num_bad)

    @property
    def num_bytes(self) -> int:
        """Memory of one batch of streams, bytes."""
        return sum(tensor.nbytes for tensor in tensors(self))


class OnlineEnhancer:
    """Enhance a stream: push any number of samples, get back all that are ready.

    The output equals that of `model.enhance` on the whole signal with the same noise, however the
    input is cut into pushes, and needs no future samples: a frame is analysed when its last
    sample has been pushed. After `flush`, as many samples have come out as went in. A network that
    can remember its history does so, and a frame then costs the same after an hour. The last three
    arguments are for such networks. Raises ConfigError for one that the model does not support.
    """

    def __init__(
        self,
        model: DiffusionBufferModel,  # run in evaluation mode, then restored to its mode
        seed: int = 0,  # of the diffusion noise, so that a stream can be repeated
        delay: int | None = None,  # d, 1 to B frames, of a data-prediction model; None for B
        batch: int = 1,  # streams that run side by side
        *,
        compiled: bool = False,  # run one compiled graph, which takes about a minute to compile
        precision: Precision = "fp32",  # bf16: bfloat16
        # onnx: hops run as an ONNX graph, which takes half a minute to make and is cached; same
        # samples up to rounding.
        backend: Backend = "torch",
    ) -> None:
        self.model, self.seed, self.batch = model, seed, batch
        self.spectral = model.framing
        sampler = model.sampler(delay, compiled=compiled, precision=precision)
        self.sampler: BufferSampler | GraphSampler = sampler
        if backend == "onnx":
            if compiled or precision != "fp32":
                raise ConfigError("compiled and bf16 need torch: leave them out, or onnx")
            self.sampler = GraphSampler(sampler, cached_graph(model, delay))
        self.device = self.sampler.t.device
        self.reset()

    @property
    def latency_samples(self) -> int:
        """Samples to push before the first one comes out: d - 1 hops and the frames that cover it.

        Sample 0 is complete when the last frame that covers it has left the buffer. Other samples
        wait longer: see `worst_latency_samples`.
        """
        n_fft, hop = self.spectral.n_fft, self.spectral.hop_length
        first_frame = n_fft - n_fft // 2  # the rest of it is silence before sample 0
        last_frame = n_fft // 2 // hop  # the last one over sample 0, counted from 0
        return first_frame + (last_frame + self.sampler.delay - 1) * hop

    @property
    def worst_latency_samples(self) -> int:
        """Largest number of samples between a sample's push and the push that outputs it.

        n_fft + (d - 1) hop: a sample just after a frame's end waits for the next frame, which is
        n_fft long, and for d - 1 hops of the buffer.
        """
        return self.spectral.n_fft + (self.sampler.delay - 1) * self.spectral.hop_length

    def reset(self) -> None:
        """Forget the stream, and restart the noise from the seed."""
        B, n_fft, zeros = self.batch, self.spectral.n_fft, self.sampler.t.new_zeros
        dtype = self.sampler.t.dtype.to_complex()
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        past = n_fft // 2  # frames are centred: the first begins before the stream
        self.state = StreamState(
            waiting=zeros(B, past),
            buffer=self.sampler.start(B, self.spectral.num_bins, self.generator, dtype),
            overlap=zeros(B, n_fft),
            envelope=zeros(n_fft),
            num_bad=zeros((), dtype=torch.long),
            given=-past,
        )
        self._as_given: Callable[[Tensor], Any] = lambda rows: rows[0] if len(rows) == 1 else rows

    def push(self, samples: Any) -> Any:
        """Take in samples and return those that are ready.

        `samples` is a tensor or numpy array, [T], [1, T] or [batch, T], of any length; floating
        point of full scale 1, int16 or int32 of their own full scale (else ShapeError). The
        result has the same kind, dtype and axes, and T' samples; T' may be 0. NaN and Inf samples
        are taken as zeros and counted in `state.bad`: a single one would silence the stream for
        good. After an exception, the stream starts over.
        """
        rows, self._as_given = self._rows(samples)
        self.state.taken += rows.shape[-1]
        try:
            return self._as_given(self._advance(rows))
        except BaseException:
            self.reset()
            raise

    def _rows(self, samples: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Return samples as [batch, T] of the model's type, and a function that converts back."""
        tensor = torch.from_numpy(samples) if isinstance(samples, np.ndarray) else samples
        full = {torch.int16: 2.0**15, torch.int32: 2.0**31}
        known = isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.dtype in full)
        if not known or tensor.ndim not in (1, 2):
            kind = f"{list(samples.shape)} {samples.dtype}" if hasattr(samples, "dtype") else ""
            takes = f"a tensor or array of floats, int16 or int32, [T] or [{self.batch}, T]"
            raise ShapeError(f"push takes {takes}, not {kind or type(samples).__name__}")
        rows = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
        if rows.shape[0] != self.batch:
            what = f"[T] or [{self.batch}, T] samples, not {list(samples.shape)}"
            raise ShapeError(f"push takes {what}: average the channels, or give batch=...")
        scale = full.get(tensor.dtype)
        rows = rows.to(self.device, self.sampler.t.dtype) / (scale or 1.0)
        bad = ~rows.isfinite()
        self.state.num_bad = self.state.num_bad + bad.sum()

        def as_given(out: Tensor) -> Any:
            if scale is not None:  # float64: float32 cannot hold the largest int32
                out = (out.double() * scale).round().clamp(-scale, scale - 1)
            out = out.to(tensor.device, tensor.dtype)
            out = out[0] if tensor.ndim == 1 else out
            return out.numpy() if isinstance(samples, np.ndarray) else out

        return rows.masked_fill(bad, 0.0), as_given

    def flush(self) -> Any:
        """End the stream: return what is still inside, and reset.

        Returns T' samples of the kind pushed last: the whole output is as long as the input.
        """
        state, missing = self.state, self.state.taken - max(0, self.state.given)
        silence = state.overlap.new_zeros(self.batch, self.spectral.hop_length)
        ready = [silence[:, :0]]
        while state.given < state.taken:
            ready.append(self._advance(silence))
        out = self._as_given(torch.cat(ready, dim=-1)[:, :missing])
        self.reset()
        return out

    @torch.inference_mode()
    def _advance(self, rows: Tensor) -> Tensor:
        """Analyse, enhance and synthesise every frame that has become complete."""
        state, spectral = self.state, self.spectral
        n_fft, hop = spectral.n_fft, spectral.hop_length
        state.waiting = torch.cat([state.waiting, rows], dim=-1)
        window = spectral.window.to(rows.dtype)
        ready, start = [rows[:, :0]], 0
        with evaluating(self.model):
            while state.waiting.shape[-1] - start >= n_fft:
                frame = state.waiting[:, start : start + n_fft]
                start += hop
                R = spectral.compress(torch.fft.rfft(frame * window))
                clean = self.sampler.step(state.buffer, R, self.generator)
                if state.buffer.pushed >= self.sampler.delay:
                    ready.append(self._synthesise(clean, window))
        state.waiting = state.waiting[:, start:]
        out = torch.cat(ready, dim=-1)
        first, state.given = max(0, -state.given), state.given + out.shape[-1]
        return out[:, first:]

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
