"""Noise that is no drone, so that a model trained on drones is not blind to the rest.

Each function synthesises one kind from drawn parameters and returns [1, T] float32, peak 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Array = npt.NDArray[np.float64]


def coloured(rng: np.random.Generator, samples: int, sample_rate: int) -> Tensor:
    """Noise of a power law, 1 / f^a with a from 0 (white) to 2 (brown)."""
    return _finish(_shaped(rng, samples, sample_rate, slope=rng.uniform(0, 2)))


def wind(rng: np.random.Generator, samples: int, sample_rate: int) -> Tensor:
    """Wind in a microphone: noise below a few hundred Hz that comes in gusts."""
    noise = _shaped(rng, samples, sample_rate, slope=rng.uniform(1.5, 3), low=rng.uniform(20, 80))
    gusts = _slow(rng, samples, sample_rate, seconds=rng.uniform(0.2, 1.5))
    return _finish(noise * np.exp(rng.uniform(0.3, 1.2) * gusts))


def engine(rng: np.random.Generator, samples: int, sample_rate: int) -> Tensor:
    """A motor: harmonics of a speed that wanders, and a hiss."""
    speed = rng.uniform(25, 120) * (
        1 + rng.uniform(0.01, 0.1) * _slow(rng, samples, sample_rate, seconds=rng.uniform(0.5, 3))
    )
    phase = 2 * np.pi * np.cumsum(speed) / sample_rate
    slope, tone = rng.uniform(2, 9), np.zeros(samples)
    for harmonic in range(1, int(min(40, 0.4 * sample_rate / speed.max())) + 1):
        level = 10 ** ((-slope * np.log2(harmonic) + rng.normal(0, 4)) / 20)
        tone += level * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
    hiss = _shaped(rng, samples, sample_rate, slope=rng.uniform(0, 1.5))
    return _finish(tone / tone.std() + 10 ** (rng.uniform(-20, 0) / 20) * hiss / hiss.std())


def rain(rng: np.random.Generator, samples: int, sample_rate: int) -> Tensor:
    """Drops: decaying bursts at random moments, from single ones to a patter, over a hiss."""
    hits = rng.random(samples) < rng.uniform(5, 400) / sample_rate
    drops = hits * rng.exponential(1, samples)
    length = int(0.02 * sample_rate)
    decay = np.exp(-np.arange(length) / (rng.uniform(0.001, 0.006) * sample_rate))
    burst = np.convolve(drops, decay * rng.normal(0, 1, length))[:samples]
    hiss = _shaped(rng, samples, sample_rate, slope=rng.uniform(0, 1))
    level = max(burst.std(), 1e-9)
    return _finish(burst / level + 10 ** (rng.uniform(-30, -5) / 20) * hiss / hiss.std())


KINDS: dict[str, Callable[[np.random.Generator, int, int], Tensor]] = {
    "coloured": coloured,
    "wind": wind,
    "engine": engine,
    "rain": rain,
}


def _shaped(
    rng: np.random.Generator, samples: int, sample_rate: int, slope: float, low: float = 20.0
) -> _Array:
    """Gaussian noise whose power falls as 1 / f^slope above `low`, Hz."""
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / sample_rate), low)
    spectrum = np.fft.rfft(rng.normal(size=samples)) * frequency ** (-slope / 2)
    shaped: _Array = np.fft.irfft(spectrum, n=samples)
    return shaped / shaped.std()


def _slow(rng: np.random.Generator, samples: int, sample_rate: int, seconds: float) -> _Array:
    """Draw a smooth curve of unit deviation that changes about every `seconds`."""
    points = max(4, int(samples / sample_rate / seconds) + 2)
    values = rng.normal(size=points)
    return np.interp(np.linspace(0, points - 1, samples), np.arange(points), values)


def _finish(wave: _Array) -> Tensor:
    return torch.from_numpy((wave / np.abs(wave).max()).astype(np.float32))[None]
