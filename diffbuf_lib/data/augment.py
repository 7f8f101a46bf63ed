"""What a clean recording may go through before noise is added: another voice, room, microphone."""

from __future__ import annotations

import math

import numpy as np
import torch
import torchaudio.functional as AF
from torch import Tensor

from diffbuf_lib.data.files import resample
from diffbuf_lib.errors import MissingExtraError

_PIVOT = 1000.0  # Hz, where a tilt changes nothing


def change_speed(wave: Tensor, length: int) -> Tensor:
    """Play a wave faster or slower, and higher or lower with it, so that it has `length` samples.

    Args:
        wave: [C, T] float32.
        length: samples; T of them take as long.

    Returns:
        [C, length] float32.
    """
    return resample(wave, wave.shape[1], length)


def tilt_spectrum(wave: Tensor, sample_rate: int, db_per_octave: float) -> Tensor:
    """Let the spectrum rise or fall around 1 kHz, as another microphone or a coat would.

    Below 100 Hz and above 8 kHz the gain stays what it is there.

    Args:
        wave: [C, T] float32.
        sample_rate: Hz.
        db_per_octave: positive for brighter.

    Returns:
        [C, T] float32, of the same power.
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


def draw_response(rng: np.random.Generator, sample_rate: int) -> Tensor:
    """Synthesise the impulse response of a shoebox room by the image-source method.

    From 3 m x 3 m to 10 m x 8 m, reverberation times of 0.1 to 0.5 s, the talker 0.5 to 3 m away.

    Args:
        rng: where randomness comes from.
        sample_rate: Hz.

    Returns:
        [N] float32; the direct sound is at sample 0 and has a peak of 1.

    Raises:
        MissingExtraError: pyroomacoustics is not installed.
    """
    pra = _pyroomacoustics()
    size = rng.uniform([3, 3, 2.4], [10, 8, 4])
    shortest = 0.161 * np.prod(size) / (2 * (size[0] * size[1] + size[2] * (size[0] + size[1])))
    seconds = max(rng.uniform(0.1, 0.5), 1.05 * shortest)  # Sabine: absorption of 1 at most
    absorption, order = pra.inverse_sabine(seconds, size)
    room = pra.ShoeBox(
        size, fs=sample_rate, materials=pra.Material(absorption), max_order=min(order, 12)
    )
    microphone = rng.uniform(0.3 * size, 0.7 * size)
    distance, angle = rng.uniform(0.5, 3.0), rng.uniform(0, 2 * math.pi)
    talker = microphone + distance * np.array([math.cos(angle), math.sin(angle), 0])
    room.add_source(np.clip(talker, 0.2, size - 0.2))
    room.add_microphone(microphone)
    room.compute_rir()
    response = torch.tensor(np.asarray(room.rir[0][0]), dtype=torch.float32)
    start = int(response.abs().argmax())
    return response[start:] / response[start]


def _pyroomacoustics():  # type: ignore[no-untyped-def]
    try:
        import pyroomacoustics
    except ImportError as error:
        raise MissingExtraError(
            "rooms need the package pyroomacoustics, which is not installed: "
            "pip install 'diffbuf[pretraining]'"
        ) from error
    return pyroomacoustics
