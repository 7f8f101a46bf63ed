"""The DN-LM recipe: one noisy mixture from speech and noise.

Source: Liu et al., "Edge-Deployed Band-Split Rotary Position Encoding Transformer for Ultra-Low
SNR UAV Speech Enhancement", Drones 9(6):386, 2025.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffbuf_lib.errors import DataError

# Below full scale by 4 steps of 16-bit PCM: rounding target and noise never clips their sum.
PEAK_LIMIT = 1 - 4 / 32768
# A peak below about 3 steps of 16-bit PCM is dither or digital silence, not a signal.
SILENCE_PEAK = 1e-4


class Mixture(NamedTuple):
    """What `mix_pair` returns.

    Attributes:
        mix: [C, T] float32, full scale 1; target + noise, exactly.
        target: [C, T] float32, the speech as it is in `mix`.
        noise: [C, T] float32, the noise as it is in `mix`.
        scale: the one factor on all three that keeps them within full scale; 1 if none is needed.
    """

    mix: Tensor
    target: Tensor
    noise: Tensor
    scale: float


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

    Returns:
        The mixture and its two parts.

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
    scale = fit_full_scale(mix, target, noise)
    if scale < 1:
        target, noise = target * scale, noise * scale
        mix = target + noise  # summed again, so that mix - target is the noise, bit for bit or so
    return Mixture(mix, target, noise, scale)


def peak_normalize(wave: Tensor, what: str = "wave") -> Tensor:
    """Scale a wave so that its largest magnitude is 1.

    Args:
        wave: [C, T] float32.
        what: what to call it in the error message.

    Returns:
        [C, T] float32.

    Raises:
        DataError: the wave is silent; take another excerpt.
    """
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
    """Attenuate by 1 / distance, as the sound pressure of a point source falls.

    Args:
        wave: [C, T] float32.
        distance: m, above 0.

    Returns:
        [C, T] float32.

    Raises:
        DataError: the distance is not positive; give metres.
    """
    if not (distance > 0 and math.isfinite(distance)):
        raise DataError(f"distance {distance} m is not above 0: give the distance in metres")
    return wave / distance


def scale_to_snr(target: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Scale noise so that 10 log10(power of target / power of noise) is `snr_db`.

    Args:
        target: [C, T] float32, not silent.
        noise: [C, T] float32, not silent.
        snr_db: dB.

    Returns:
        [C, T] float32, the scaled noise.

    Raises:
        DataError: the SNR is not a finite number; give it in dB.
    """
    if not math.isfinite(snr_db):
        raise DataError(f"SNR {snr_db} dB is not a finite number: give it in dB")
    return noise * 10 ** ((snr(target, noise) - snr_db) / 20)


def snr(target: Tensor, noise: Tensor) -> float:
    """Return 10 log10(power of target / power of noise) in dB, for [C, T] waves with power."""
    powers = [float(wave.double().square().mean()) for wave in (target, noise)]
    return 10 * math.log10(powers[0] / powers[1])


def fit_full_scale(*waves: Tensor) -> float:
    """Return the one factor, at most 1, that brings all waves [C, T] within `PEAK_LIMIT`."""
    peak = float(torch.stack([wave.abs().max() for wave in waves]).max())
    return min(1.0, PEAK_LIMIT / peak) if peak > 0 else 1.0
