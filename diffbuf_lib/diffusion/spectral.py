"""Waveform to compressed complex spectrogram, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbuf_lib.config import CompressionConfig, STFTConfig
from diffbuf_lib.errors import ShapeError

_COSINE_COEFFICIENTS = {"hann": 0.5, "sqrt_hann": 0.5, "hamming": 0.54}


class Spectral(nn.Module):
    """STFT with magnitude compression c -> beta |c|^alpha e^{i angle c} (Lay et al. 2025).

    With `center`, frame k is centred on sample k * hop and the signal is padded with zeros on
    both sides, never by reflection: a stream starts from silence, so that the frames of a stream
    are exactly those of the whole signal. Arguments are the keys of `STFTConfig`, in samples, and
    of `CompressionConfig`; F = n_fft // 2 + 1 bins; win_length None is n_fft.
    """

    window: Tensor

    def __init__(
        self,
        n_fft: int = 510,
        hop_length: int = 256,
        win_length: int | None = None,
        window: str = "hann",
        center: bool = True,
        alpha: float = 0.5,
        beta: float = 0.15,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.center = n_fft, hop_length, center
        self.alpha, self.beta = alpha, beta
        win_length = win_length or n_fft
        padding = n_fft - win_length
        phase = 2 * torch.pi * torch.arange(win_length, dtype=torch.float64) / win_length
        offset = _COSINE_COEFFICIENTS[window]
        taps = offset - (1 - offset) * phase.cos()
        taps = taps.sqrt() if window == "sqrt_hann" else taps
        taps = F.pad(taps, (padding // 2, padding - padding // 2))
        self.register_buffer("window", taps.float(), persistent=False)

    @classmethod
    def from_config(cls, stft: STFTConfig, compression: CompressionConfig) -> Spectral:
        """Make one from `cfg.audio.stft` and `cfg.preprocessing.magnitude_compression`."""
        return cls(**stft.model_dump(), **compression.model_dump())

    @property
    def num_bins(self) -> int:
        """F, frequency bins."""
        return self.n_fft // 2 + 1

    def num_frames(self, samples: int) -> int:
        """K for a signal of `samples` samples: 1 + T // hop, or 1 + (T - n_fft) // hop."""
        stft = STFTConfig.model_construct(
            n_fft=self.n_fft, hop_length=self.hop_length, center=self.center
        )
        return stft.num_frames(samples)

    def forward(self, wave: Tensor) -> Tensor:
        """Analyse a signal: [B, T] float32 or float64, full scale 1, to [B, F, K] compressed.

        Half precision becomes float32. Raises ShapeError if the signal is too short for a frame.
        """
        if wave.ndim != 2:
            raise ShapeError(f"Spectral takes [B, T], not {list(wave.shape)}: average the channels")
        if self.num_frames(wave.shape[-1]) < 1:
            what = f"Buffer size must be at least 1. {wave.shape[-1]} samples give no STFT frame of"
            raise ShapeError(f"{what} n_fft {self.n_fft}: give more or lower audio.stft.n_fft")
        wave = wave if wave.dtype == torch.float64 else wave.float()
        if self.center:  # torch.stft's own padding loses the last frame of an odd n_fft
            wave = F.pad(wave, (self.n_fft // 2, self.n_fft - self.n_fft // 2))
        frames = torch.stft(
            wave, self.n_fft, self.hop_length, window=self.window.to(wave.dtype), center=False,
            return_complex=True,
        )  # fmt: skip
        return self.compress(frames)

    def inverse(self, spec: Tensor, length: int) -> Tensor:
        """Synthesise a signal by weighted overlap-add (Griffin and Lim 1984, eq. 6).

        Exact wherever some frame's window is not zero. Samples that no frame covers, and those
        that only the last 1e-4 of a window's flank covers (a modified spectrum would be blown up
        there), fade to zero: pad a signal to a whole number of hops to avoid both. Maps [B, F, K]
        complex, compressed, to [B, T] of its precision, T = `length`.
        """
        frames = torch.fft.irfft(self.expand(spec).transpose(1, 2), self.n_fft)  # [B, K, n_fft]
        window = self.window.to(frames.dtype)
        start = self.n_fft // 2 if self.center else 0
        total = max(self.n_fft + (frames.shape[1] - 1) * self.hop_length, start + length)
        signal = self.overlap_add(frames * window, total)
        envelope = self.overlap_add(window.square().expand(1, *frames.shape[1:]), total)
        return self.normalise(signal, envelope)[:, start : start + length]

    def normalise(self, signal: Tensor, envelope: Tensor) -> Tensor:
        """Divide overlap-added samples by the sum of squared windows, where it is not zero."""
        floor = 1e-8
        return torch.where(envelope > floor, signal / envelope.clamp_min(floor), signal)

    def overlap_add(self, frames: Tensor, total: int) -> Tensor:
        """Overlap-add frames [B, K, n_fft]; returns samples [B, total]."""
        covered = self.n_fft + (frames.shape[1] - 1) * self.hop_length
        sizes = (1, covered), (1, self.n_fft)
        signal = F.fold(frames.transpose(1, 2), *sizes, stride=(1, self.hop_length))[:, 0, 0]
        return F.pad(signal, (0, total - covered))

    def compress(self, spec: Tensor) -> Tensor:
        """Map c to beta |c|^alpha e^{i angle c}, any shape."""
        if self.alpha == 1:
            return spec * self.beta
        magnitude = spec.abs().clamp_min(torch.finfo(spec.dtype).tiny)
        return spec * (self.beta * magnitude ** (self.alpha - 1))

    def expand(self, spec: Tensor) -> Tensor:
        """Undo `compress`: c -> (|c| / beta)^(1 / alpha) e^{i angle c}, any shape."""
        if self.alpha == 1:
            return spec / self.beta
        # The clamp keeps the gradient at zero finite: it is zero there.
        magnitude = spec.abs().clamp_min(torch.finfo(spec.dtype).tiny)
        return spec * (magnitude ** (1 / self.alpha - 1) * self.beta ** (-1 / self.alpha))
