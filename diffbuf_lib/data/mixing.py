"""One noisy mixture from speech and noise, and what the speech may go through before.

Source of the recipe: Liu et al., "Edge-Deployed Band-Split Rotary Position Encoding Transformer
for Ultra-Low SNR UAV Speech Enhancement", Drones 9(6):386, 2025.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torchaudio.functional as AF
from torch import Tensor

from diffbuf_lib.data.audio import resample
from diffbuf_lib.errors import DataError

# Below full scale by 4 steps of 16-bit PCM: rounding target and noise never clips their sum.
PEAK_LIMIT = 1 - 4 / 32768
# A peak below about 3 steps of 16-bit PCM is dither or digital silence, not a signal.
SILENCE_PEAK = 1e-4
_PIVOT = 1000.0  # Hz, where a tilt changes nothing


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
    """Mix speech with noise as DN-LM does.

    Both are peak-normalised and attenuated by 1 / distance; then the noise is scaled until the
    input SNR is `snr_db`; then, if anything exceeds full scale, all three take one factor. The SNR
    is set last, so `noise_distance` cannot be heard: it is here because the recipe names it.

    Args:
        speech: [C, T] float32, any scale.
        noise: [C, T] float32, any scale.
        snr_db: 10 log10 of speech power over noise power in the mixture, dB.
        speech_distance: from the talker to the microphone, m.
        noise_distance: from the rotors to the microphone, m.

    Raises:
        DataError: shapes differ, speech or noise is silent (take another excerpt), or a distance
            is not positive.
    """
    if speech.shape != noise.shape:
        raise DataError(
            f"speech {tuple(speech.shape)} and noise {tuple(noise.shape)} differ in shape "
            "[channels, time]: cut them to one length and one number of channels"
        )
    target = attenuate(peak_normalize(speech, "speech"), speech_distance)
    noise = attenuate(peak_normalize(noise, "noise"), noise_distance)
    noise = scale_to_snr(target, noise, snr_db)
    mix = target + noise
    peak = float(torch.stack([wave.abs().max() for wave in (mix, target, noise)]).max())
    scale = min(1.0, PEAK_LIMIT / peak)
    if scale < 1:
        target, noise = target * scale, noise * scale
        mix = target + noise  # summed again, so that mix - target is the noise, bit for bit or so
    return Mixture(mix, target, noise, scale)


def peak_normalize(wave: Tensor, what: str = "wave") -> Tensor:
    """Scale a wave [C, T] so that its largest magnitude is 1; `what` names it if it is silent."""
    if is_silent(wave):
        raise DataError(
            f"the {what} is silent (peak below {SILENCE_PEAK:g} of full scale), so no SNR can be "
            "set: take another excerpt, or remove the file"
        )
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


def change_speed(wave: Tensor, length: int) -> Tensor:
    """Play a wave [C, T] faster or slower, and so higher or lower, until it is [C, length]."""
    return resample(wave, wave.shape[1], length)


def tilt_spectrum(wave: Tensor, sample_rate: int, db_per_octave: float) -> Tensor:
    """Let the spectrum rise or fall around 1 kHz, as another microphone or a coat would.

    Below 100 Hz and above 8 kHz the gain stays what it is there; the power stays the same.

    Args:
        wave: [C, T] float32.
        sample_rate: Hz.
        db_per_octave: positive for brighter.
    """
    spectrum = torch.fft.rfft(wave)
    frequency = torch.fft.rfftfreq(wave.shape[-1], 1 / sample_rate).clamp(100, 8000)
    gain = 10 ** (db_per_octave / 20 * torch.log2(frequency / _PIVOT))
    tilted = torch.fft.irfft(spectrum * gain, n=wave.shape[-1])
    power, before = tilted.square().mean(), wave.square().mean()
    return tilted * torch.sqrt(before / power) if power > 0 else tilted


def reverberate(wave: Tensor, response: Tensor) -> Tensor:
    """Convolve with a room's impulse response, its direct sound at sample 0.

    Args:
        wave: [C, T] float32.
        response: [N] float32.

    Returns:
        [C, T] float32, aligned with wave; the tail after its end is cut.
    """
    wet = AF.fftconvolve(wave, response.expand(wave.shape[0], -1))
    return wet[:, : wave.shape[-1]]
