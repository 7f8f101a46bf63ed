"""Unlimited noise: the noise of every clip is generated from random parameters, never from files.

A model that is trained on one synthesiser only learns that synthesiser. Here a clip has one to
three sources from families that have little in common; each goes through a random filter, their
sum through a room and a microphone. Held-out families (`HELD_OUT`) never occur in training: a
model's gain on them indicates its gain on noises that nobody thought of.

Everything is a function of the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.signal import butter, lfilter, sosfilt

from recipes.demo.drone import DroneParameters, synthesise

Array = npt.NDArray[np.float64]
Family = Callable[[np.random.Generator, int, int], Array]
"""(rng, samples, sample rate in Hz) -> [T], at any level."""


def draw_noise(
    rng: np.random.Generator, samples: int, rate: int, families: dict[str, Family] | None = None
) -> Array:
    """Draw the noise of one clip.

    Args:
        rng: where randomness comes from.
        samples: length.
        rate: Hz.
        families: to choose from; default: those of training.

    Returns:
        [T] float64, RMS 1.
    """
    chosen = TRAINING if families is None else families
    names = list(chosen)
    # Drones above all: their family is the likeliest.
    weights = np.array([WEIGHTS.get(name, 1.0) for name in names])
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    total = np.zeros(samples)
    for name in rng.choice(
        names, size=min(count, len(names)), replace=False, p=weights / weights.sum()
    ):
        source = random_filter(rng, chosen[name](rng, samples, rate), rate)
        total += _unit(source) * 10 ** (rng.uniform(-12, 0) / 20)
    if rng.random() < 0.4:
        total = random_room(rng, total, rate)
    return _unit(total)


# Broadband.


def coloured(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Steady noise with a random smooth spectrum, slowly modulated."""
    return shaped_noise(rng, samples, rate, spread=10.0) * slow_gain(rng, samples, rate, 4.0)


def gusts(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Wind on a microphone: turbulence below some hundred Hz that comes and goes."""
    corner = rng.uniform(30, 250)
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    slope = (1 + (frequency / corner) ** 2) ** (-rng.uniform(0.6, 1.4))
    rumble = np.fft.irfft(np.fft.rfft(rng.normal(size=samples)) * slope, samples)
    flutter = np.abs(low_rate(rng, samples, rate, rng.uniform(2, 12)))
    return rumble * slow_gain(rng, samples, rate, 12.0) * (0.2 + flutter)


def vehicle(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Traffic: low rolling noise, an engine's orders at changing speed, a vehicle passing by."""
    seconds = samples / rate
    speed = rng.uniform(15, 60) * glide(rng, samples, rate, 0.3)  # firing rate, Hz
    engine = harmonics(rng, 2 * np.pi * np.cumsum(speed) / rate, int(rng.integers(6, 30)), 4.0)
    tyres = shaped_noise(rng, samples, rate, spread=4.0, tilt=rng.uniform(-6, -2))
    time = np.arange(samples) / rate
    distance = (time - rng.uniform(-0.5, 1.5) * seconds) / rng.uniform(0.3, 2.0)
    passing = 1 / np.sqrt(1 + distance**2) if rng.random() < 0.5 else 1.0
    return (_unit(tyres) + rng.uniform(0.1, 1.5) * _unit(engine)) * passing


def drops(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Rain, gravel, applause, frying: many short impulses, each through a resonance."""
    density = 10 ** rng.uniform(1.0, 3.3)  # per second
    hits = (rng.random(samples) < density / rate) * rng.exponential(size=samples)
    signs = rng.choice([-1.0, 1.0], size=samples)
    return resonances(rng, hits * signs * slow_gain(rng, samples, rate, 8.0), rate, count=3)


# Tones.


def comb(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Machines: one to six combs of harmonics with wandering pitch, plus broadband noise."""
    first = 10 ** rng.uniform(math.log10(25), math.log10(700))
    total = np.zeros(samples)
    for _ in range(int(rng.integers(1, 7))):
        pitch = (
            first
            * (1 + rng.normal() * rng.choice([0.002, 0.03]))
            * glide(rng, samples, rate, rng.choice([0.002, 0.02, 0.15]))
        )
        angle = 2 * np.pi * np.cumsum(pitch) / rate
        count = max(1, min(80, int(0.48 * rate / pitch.max())))
        tone = harmonics(rng, angle, count, rng.uniform(0, 9), jitter=rng.uniform(0, 8))
        depth = rng.uniform(0, 0.9)  # beats with its own shaft, or at a rate of its own
        rate_of_beats = (
            angle / rng.integers(1, 6)
            if rng.random() < 0.6
            else (2 * np.pi * rng.uniform(0.3, 30) * np.arange(samples) / rate)
        )
        total += tone * (1 + depth * np.cos(rate_of_beats + rng.uniform(0, 6.3)))
    hiss = shaped_noise(rng, samples, rate, spread=8.0)
    return _unit(total) + 10 ** (rng.uniform(-25, 5) / 20) * _unit(hiss)


def drone(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """A drone from rotor physics, with parameters drawn wider than one maker's catalogue."""
    parameters = DroneParameters.draw(rng)
    return np.asarray(synthesise(parameters, samples, rate, rng)[0].double().numpy())


def hum(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """The mains and its harmonics, buzzing more or less."""
    mains = rng.choice([50.0, 60.0, 400.0]) * (1 + 1e-3 * rng.normal())
    angle = 2 * np.pi * mains * np.arange(samples) / rate
    tones = harmonics(rng, angle, int(min(60, 0.45 * rate / mains)), rng.uniform(2, 12), jitter=8.0)
    return _unit(tones) + 10 ** (rng.uniform(-40, -5) / 20) * rng.normal(size=samples)


def music(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Notes of a scale on a beat: chords of decaying harmonics, with or without percussion."""
    beat = int(rate * rng.uniform(0.12, 0.5))
    scale = 55 * 2 ** (np.sort(rng.choice(12, size=6, replace=False)) / 12)
    total = np.zeros(samples + 2 * rate)
    for start in range(0, samples, beat):
        for _ in range(int(rng.integers(0, 4))):
            length = int(rate * rng.uniform(0.1, 1.5))
            pitch = rng.choice(scale) * 2 ** int(rng.integers(0, 5))
            angle = 2 * np.pi * pitch * np.arange(length) / rate
            count = max(1, min(20, int(0.45 * rate / pitch)))
            note = harmonics(rng, angle, count, rng.uniform(4, 12), jitter=4.0)
            decay = np.exp(-np.arange(length) / (rate * rng.uniform(0.05, 0.8)))
            attack = np.minimum(1, np.arange(length) / (rate * rng.uniform(0.002, 0.05)))
            total[start : start + length] += _unit(note) * decay * attack * rng.exponential()
        if rng.random() < 0.4:
            burst = rng.normal(size=int(0.08 * rate)) * np.exp(
                -np.arange(int(0.08 * rate)) / (0.02 * rate)
            )
            total[start : start + len(burst)] += rng.exponential() * burst
    return total[:samples]


def siren(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Alarms, sirens, beeps, birds: few partials whose pitch sweeps or is keyed."""
    time = np.arange(samples) / rate
    centre, sweep = 10 ** rng.uniform(2.5, 3.6), rng.uniform(0, 0.8)
    cycle = np.sin(2 * np.pi * 10 ** rng.uniform(-0.5, 1.3) * time + rng.uniform(0, 6.3))
    shape = np.sign(cycle) if rng.random() < 0.4 else cycle
    pitch = np.minimum(centre * 2 ** (sweep * shape), 0.24 * rate)
    keyed = (cycle > rng.uniform(-1, 0.6)) if rng.random() < 0.5 else 1.0
    return harmonics(rng, 2 * np.pi * np.cumsum(pitch) / rate, 2, 9.0) * keyed


# Events.


def impacts(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Knocks, keys, dishes, steps: occasional hits on something that rings."""
    hits = np.zeros(samples)
    gap = rng.uniform(0.05, 0.8)
    at = rng.exponential(gap)
    while at < samples / rate:
        hits[int(at * rate)] += rng.exponential() * rng.choice([-1, 1])
        at += gap * (1.0 if rng.random() < 0.3 else rng.exponential())
    return resonances(rng, hits, rate, count=int(rng.integers(2, 8))) + 1e-3 * rng.normal(
        size=samples
    )


def chatter(rng: np.random.Generator, samples: int, rate: int) -> Array:
    """Babble without words: buzzing voices filtered by vowel resonances, syllable by syllable."""
    total = np.zeros(samples)
    for _ in range(int(rng.integers(3, 9))):
        pitch = rng.uniform(80, 260) * glide(rng, samples, rate, 0.15)
        count = int(0.4 * rate / pitch.max())
        buzz = harmonics(rng, 2 * np.pi * np.cumsum(pitch) / rate, count, 6.0)
        voiced = low_rate(rng, samples, rate, rng.uniform(3, 6))
        breath = 0.3 * rng.normal(size=samples) * (voiced < -0.5)
        syllables = np.clip(voiced, 0, None)
        total += resonances(
            rng, _unit(buzz) * syllables + breath, rate, count=3, low=300, high=3500
        )
    return total


WEIGHTS = {"drone": 2.5, "comb": 2.0, "coloured": 1.5}
TRAINING: dict[str, Family] = {
    "coloured": coloured, "gusts": gusts, "vehicle": vehicle, "comb": comb, "drone": drone,
    "hum": hum, "music": music, "impacts": impacts, "chatter": chatter,
}  # fmt: skip
HELD_OUT: dict[str, Family] = {"drops": drops, "siren": siren}


# Building blocks of the noises.


def shaped_noise(
    rng: np.random.Generator, samples: int, rate: int, spread: float, tilt: float | None = None
) -> Array:
    """Gaussian noise whose spectrum is a tilt and a random walk over octaves.

    Args:
        rng: where randomness comes from.
        samples: length.
        rate: Hz.
        spread: standard deviation of the spectrum around its tilt, dB.
        tilt: dB per octave; None: drawn.
    """
    tilt = rng.uniform(-6, 3) if tilt is None else tilt
    return _filtered(rng.normal(size=samples), rate, *_random_curve(rng, spread, tilt))


def random_filter(rng: np.random.Generator, wave: Array, rate: int) -> Array:
    """Apply a random smooth response, like that of distance, bodies and microphones."""
    return _filtered(wave, rate, *_random_curve(rng, rng.uniform(0, 8), rng.uniform(-3, 2)))


def _random_curve(rng: np.random.Generator, spread: float, tilt: float) -> tuple[Array, Array]:
    """Return octaves (log2 Hz) and levels (dB): a tilt, a rough curve, sometimes a notch."""
    octaves = np.linspace(4, 13.5, int(rng.integers(6, 40)))
    level = tilt * (octaves - 10) + spread * rng.normal(size=len(octaves))
    if rng.random() < 0.3:
        level[rng.integers(len(octaves))] += rng.choice([-30, 20])
    return octaves, level


def _filtered(wave: Array, rate: int, octaves: Array, level: Array) -> Array:
    frequency = np.fft.rfftfreq(len(wave), 1 / rate)
    gain = 10 ** (np.interp(np.log2(np.maximum(frequency, 16)), octaves, level) / 20)
    gain[frequency < 20] = 0
    return np.fft.irfft(np.fft.rfft(wave) * gain, len(wave))


def harmonics(
    rng: np.random.Generator, angle: Array, count: int, slope: float, jitter: float = 3.0
) -> Array:
    """Sum `count` harmonics of an angle [T], falling by `slope` dB per octave, phases drawn.

    By Horner's rule in z = e^{i angle}: one exponential for all.
    """
    level = -slope * np.log2(np.arange(1, count + 1)) + rng.normal(0, jitter, count)
    coefficients = 10 ** (level / 20) * np.exp(1j * rng.uniform(0, 2 * np.pi, count))
    z = np.exp(1j * angle)
    total = np.zeros_like(z)
    for coefficient in coefficients[::-1]:
        total = (total + coefficient) * z
    return np.asarray(total.real)


def low_rate(rng: np.random.Generator, samples: int, rate: int, cutoff: float) -> Array:
    """Return a slow random process of standard deviation about 1; cutoff in Hz."""
    step = max(1, int(rate / (20 * cutoff)))
    points = samples // step + 64
    a = math.exp(-2 * math.pi * cutoff * step / rate)
    slow = lfilter([math.sqrt(1 - a * a)], [1, -a], rng.normal(size=points + 100))[100:]
    return np.interp(np.arange(samples) / step, np.arange(points), slow)


def slow_gain(rng: np.random.Generator, samples: int, rate: int, spread: float) -> Array:
    """Return a gain that wanders by up to `spread` dB (drawn), within 0.1 s to seconds."""
    level = rng.uniform(0, spread) * low_rate(rng, samples, rate, 10 ** rng.uniform(-0.7, 0.9))
    return 10 ** (np.clip(level, -30, 12) / 20)


def glide(rng: np.random.Generator, samples: int, rate: int, depth: float) -> Array:
    """Return a factor near 1 that wanders by `depth`."""
    wander = low_rate(rng, samples, rate, 10 ** rng.uniform(-0.5, 0.7))
    return np.clip(1 + depth * wander, 0.5, 1.8)


def resonances(
    rng: np.random.Generator,
    wave: Array,
    rate: int,
    count: int,
    low: float = 150,
    high: float = 6000,
) -> Array:
    """Apply `count` parallel second-order resonances to a wave."""
    total = np.zeros(len(wave))
    for _ in range(count):
        frequency = 10 ** rng.uniform(math.log10(low), math.log10(min(high, 0.45 * rate)))
        radius = math.exp(-math.pi * frequency / (rate * 10 ** rng.uniform(0.3, 1.8)))  # Q 2 to 60
        poles = [1, -2 * radius * math.cos(2 * math.pi * frequency / rate), radius**2]
        total += lfilter([(1 - radius) * rng.exponential()], poles, wave)
    return total


def random_room(rng: np.random.Generator, wave: Array, rate: int) -> Array:
    """Apply a room to a wave: the direct sound and an exponential tail of noise."""
    seconds = rng.uniform(0.1, 0.8)
    length = int(seconds * rate)
    tail = rng.normal(size=length) * np.exp(-6.9 * np.arange(length) / length)
    tail *= 10 ** (rng.uniform(-20, 0) / 20) / math.sqrt(float(np.sum(tail**2)))
    size = len(wave) + length
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]
    return wave + wet


def microphone(
    rng: np.random.Generator, target: Array, noise: Array, rate: int
) -> tuple[Array, Array]:
    """Record speech and noise: band limits of both, self-noise, soft clipping of their sum.

    Returns:
        (mix, target), [T] each; the target is what the microphone would have heard of the speech
        alone, without self-noise and clipping.
    """
    if rng.random() < 0.2:
        low, high = rng.uniform(20, 200), rng.uniform(0.2, 0.48) * rate
        filters = butter(2, [low, high], "bandpass", fs=rate, output="sos")
        target, noise = sosfilt(filters, target), sosfilt(filters, noise)
    mix = target + noise
    if rng.random() < 0.3:
        mix = mix + 10 ** (rng.uniform(-70, -40) / 20) * _rms(mix) * rng.normal(size=len(mix))
    if rng.random() < 0.1:
        limit = _rms(mix) * 10 ** (rng.uniform(6, 14) / 20)
        mix = limit * np.tanh(mix / limit)
    return mix, target


def _rms(wave: Array) -> float:
    return math.sqrt(float(np.mean(np.square(wave)))) or 1.0


def _unit(wave: Array) -> Array:
    return wave / _rms(wave)
