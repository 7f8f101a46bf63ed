"""Mix speech with noise, and augment the speech beforehand.

Liu et al., "Edge-Deployed Band-Split Rotary Position Encoding Transformer
for Ultra-Low SNR UAV Speech Enhancement", Drones 9(6):386, 2025.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torchaudio.functional as AF
from torch import Tensor

from diffbuf_lib.errors import DataError

# Below full scale by 4 steps of 16-bit PCM: rounding target and noise never clips their sum.
PEAK_LIMIT = 1 - 4 / 32768
# A peak below about 3 steps of 16-bit PCM is dither or digital silence, not a signal.
SILENCE_PEAK = 1e-4


class Mixture(NamedTuple):
    """What `mix_pair` returns; waves are [C, T] float32, full scale 1."""

    mix: Tensor  # target + noise, exactly
    target: Tensor  # the speech as it is in `mix`
    noise: Tensor  # the noise as it is in `mix`
    scale: float  # the factor on all three that keeps them within full scale; 1 if none is needed


def mix_pair(
    speech: Tensor,
    noise: Tensor,
    snr_db: float,
    speech_distance: float,
    noise_distance: float = 0.5,
) -> Mixture:
    """Mix speech and noise, [C, T] float32 of any scale, as DN-LM does.

    Both are peak-normalised and attenuated by 1 / distance (m); then the noise is scaled until the
    input SNR is `snr_db`; then, if anything exceeds full scale, one factor scales all three. The
    SNR is set last, so `noise_distance` has no effect: it is here because the recipe names it.

    DataError if shapes differ, one is silent (take another excerpt), or a distance is not positive.
    """
    if speech.shape != noise.shape:
        shapes = f"{tuple(speech.shape)} and noise {tuple(noise.shape)}"
        raise DataError(f"speech {shapes} differ in shape: cut them alike")
    target = attenuate(peak_normalize(speech, "speech"), speech_distance)
    noise = attenuate(peak_normalize(noise, "noise"), noise_distance)
    noise = scale_to_snr(target, noise, snr_db)
    mix = target + noise
    peak = float(torch.stack([wave.abs().max() for wave in (mix, target, noise)]).max())
    scale = min(1.0, PEAK_LIMIT / peak)
    if scale < 1:
        target, noise = target * scale, noise * scale
        mix = target + noise  # summed again, so that mix - target is the noise up to rounding
    return Mixture(mix, target, noise, scale)


def peak_normalize(wave: Tensor, what: str = "wave") -> Tensor:
    """Scale a wave [C, T] so that its largest magnitude is 1; errors call it `what`."""
    if is_silent(wave):
        raise DataError(f"the {what} is silent, so no SNR can be set: take another excerpt or file")
    return wave / wave.abs().max()


def is_silent(wave: Tensor) -> bool:
    """Return whether no sample of a wave [C, T] (full scale 1) reaches `SILENCE_PEAK`."""
    return wave.numel() == 0 or not float(wave.abs().max()) >= SILENCE_PEAK


def attenuate(wave: Tensor, distance: float) -> Tensor:
    """Attenuate by 1 / distance (m), as the sound pressure of a point source falls."""
    if not (distance > 0 and math.isfinite(distance)):
        raise DataError(f"distance {distance} m is not above 0: give the distance in metres")
    return wave / distance


def scale_to_snr(target: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Scale noise so that `snr(target, noise)` is `snr_db`; both [C, T] and not silent."""
    if not math.isfinite(snr_db):
        raise DataError(f"SNR {snr_db} dB is not a finite number: give it in dB")
    return noise * 10 ** ((snr(target, noise) - snr_db) / 20)


def snr(target: Tensor, noise: Tensor) -> float:
    """Return 10 log10(power of target / power of noise) in dB, for [C, T] waves with power."""
    powers = [float(wave.double().square().mean()) for wave in (target, noise)]
    return 10 * math.log10(powers[0] / powers[1])


def tilt_spectrum(wave: Tensor, sample_rate: int, db_per_octave: float) -> Tensor:
    """Tilt the spectrum of a wave [C, T] around 1 kHz; its power stays the same.

    The gain is constant below 100 Hz and above 8 kHz.
    """
    spectrum = torch.fft.rfft(wave)
    frequency = torch.fft.rfftfreq(wave.shape[-1], 1 / sample_rate).clamp(100, 8000)
    gain = 10 ** (db_per_octave / 20 * torch.log2(frequency / 1000))
    tilted = torch.fft.irfft(spectrum * gain, n=wave.shape[-1])
    power, before = tilted.square().mean(), wave.square().mean()
    return tilted * torch.sqrt(before / power) if power > 0 else tilted


def reverberate(wave: Tensor, response: Tensor) -> Tensor:
    """Convolve [C, T] with a room's impulse response [N], direct sound at sample 0; cut to T."""
    wet = AF.fftconvolve(wave, response.expand(wave.shape[0], -1))
    return wet[:, : wave.shape[-1]]
