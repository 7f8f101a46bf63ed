"""Drone ego-noise, synthesised from rotor physics.

Steady loads on B blades at n rev/s sound at multiples of B n (Gutin 1936), imbalance at those of n.
Vortices shed along the blade add noise whose peak follows Strouhal's f = 0.2 V / d. Both are
dipoles: pressure grows as the third power of speed (Curle 1955; Ffowcs Williams and Hawkings 1969).
Small rotors measured: Sinibaldi and Marino, Applied Acoustics 74(1), 2013.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal import lfilter
from torch import Tensor

from diffbuf_lib.errors import DataError

STROUHAL_NUMBER = 0.2  # of vortex shedding behind a bluff body
COMMUTATION_STEPS = 6  # of a brushless motor's controller, per electrical revolution
_CONTROL_RATE = 200  # Hz, at which rotor speeds are drawn
_ROTOR_INERTIA = 0.04  # s, time constant of a small rotor's speed
_DYNAMIC_RANGE = 80.0  # dB below the first harmonic at which harmonics end
_MOST_HARMONICS = 200
_SHAFT_ORDERS = 12  # multiples of the shaft rate that imbalance can be heard in
_POSITIVE = ("rotors", "blades", "rotor_speed", "radius", "thickness", "pole_pairs")
_Array = npt.NDArray[np.float64]
_Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class DroneParameters:
    """One drone in one flight state. Spreads are standard deviations re rotor_speed."""

    rotors: int = 4
    blades: int = 2  # of each rotor
    rotor_speed: float = 90.0  # mean speed in hover, rev/s (60 times this is rpm)
    radius: float = 0.12  # of a rotor, m
    thickness: float = 0.003  # of the wake behind a blade, m; sets the vortex peak with the speed
    speed_spread: float = 0.02  # between the rotors' mean speeds
    wander: float = 0.008  # in time, of each rotor's speed
    wander_time: float = 0.3  # correlation time of that, s
    manoeuvre: float = 0.02  # in time, of what all rotors do together
    manoeuvre_time: float = 1.5  # correlation time of that, s
    harmonic_slope: float = 6.0  # fall of the blade-passing harmonics, dB per octave
    shaft_level: float = -15.0  # tones of imbalance, dB re the first blade-passing harmonic
    am_depth: float = 0.2  # of the tones' amplitude modulation at the shaft rate, 0..1
    vortex_level: float = -8.0  # power of the vortex noise, dB re the power of all tones
    vortex_sharpness: float = 1.5  # exponent of its hump, which falls by 6 times this dB per octave
    vortex_am_depth: float = 0.3  # of its modulation at the blade-passing frequency, 0..1
    whine_level: float | None = None  # power of the motor controllers' whine, dB re all tones
    pole_pairs: int = 7  # of the motors; the whine is at 6 * pole_pairs * rotor speed

    def __post_init__(self) -> None:
        """Refuse values that no drone can have."""
        for name, value in vars(self).items():
            if name in _POSITIVE and not value > 0:
                raise DataError(f"{name} {value} of DroneParameters is not above 0: raise it")

    @property
    def vortex_peak(self) -> float:
        """Frequency of the vortex hump's top at the mean speed, Hz: St V / d at 70 % radius."""
        speed = 2 * math.pi * 0.7 * self.radius * self.rotor_speed  # m/s
        return STROUHAL_NUMBER * speed / self.thickness

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """Draw a drone, most with four rotors; blade-passing frequency 90 to 450 Hz."""
        blades = int(rng.choice([2, 3], p=[0.75, 0.25]))
        radius = float(np.exp(rng.uniform(np.log(0.06), np.log(0.2))))
        # Small rotors turn faster: tip speeds of small drones are about 40 to 80 m/s.
        speed = rng.uniform(40, 80) / (2 * math.pi * radius)
        return cls(
            rotors=int(rng.choice([4, 6, 8], p=[0.8, 0.15, 0.05])),
            blades=blades,
            rotor_speed=float(np.clip(speed, 45.0, 150.0)),
            radius=radius,
            thickness=float(rng.uniform(0.0015, 0.005)),
            speed_spread=float(rng.uniform(0.003, 0.05)),
            wander=float(rng.uniform(0.002, 0.02)),
            wander_time=float(rng.uniform(0.1, 0.6)),
            manoeuvre=float(rng.uniform(0.0, 0.05)),
            manoeuvre_time=float(rng.uniform(0.5, 3.0)),
            harmonic_slope=float(rng.uniform(3.0, 9.0)),
            shaft_level=float(rng.uniform(-30.0, -8.0)),
            am_depth=float(rng.uniform(0.0, 0.5)),
            vortex_level=float(rng.uniform(-16.0, 0.0)),
            vortex_sharpness=float(rng.uniform(0.8, 2.5)),
            vortex_am_depth=float(rng.uniform(0.1, 0.7)),
            whine_level=float(rng.uniform(-35.0, -15.0)) if rng.random() < 0.7 else None,
            pole_pairs=int(rng.choice([6, 7, 11, 12])),
        )


def synthesise(parameters: DroneParameters, samples: int, sample_rate: int, rng: _Rng) -> Tensor:
    """Synthesise the noise of one drone: [1, samples] float32, peak 1; nothing aliases.

    DataError for fewer than 1 sample, or a sample_rate below 1000 Hz.
    """
    if samples < 1 or sample_rate < 1000:
        got = f"{samples} samples at {sample_rate} Hz"
        raise DataError(f"cannot synthesise {got}: ask for at least 1 sample at 1000 Hz")
    p = parameters
    speeds = _rotor_speeds(p, samples, sample_rate, rng)  # [rotors, T]
    tones, vortex, whine = np.zeros((3, samples))
    for speed in speeds:
        first = rng.uniform(0, 2 * np.pi)
        shaft = first + 2 * np.pi * np.cumsum(speed) / sample_rate  # rotor angle, radians
        # Dipoles: pressure grows with the cube of speed. Each rotor is heard a little differently.
        loudness = (speed / p.rotor_speed) ** 3 * 10 ** (rng.normal(0, 1.5) / 20)
        highest = float(speed.max())
        tones += loudness * _tones(p, shaft, highest, sample_rate, rng)
        vortex += loudness * _vortex(p, shaft, sample_rate, rng)
        whine += _whine(p, shaft, highest, sample_rate, rng)
    reference = _rms(tones) or 1.0  # rotors so fast that no tone is left: keep the rest unscaled
    noise = tones + vortex * (_gain(p.vortex_level) * reference / _rms(vortex))
    if p.whine_level is not None and whine.any():
        noise += whine * (_gain(p.whine_level) * reference / _rms(whine))
    return torch.from_numpy((noise / np.abs(noise).max()).astype(np.float32))[None]


def _rotor_speeds(p: DroneParameters, samples: int, rate: int, rng: _Rng) -> _Array:
    """Return each rotor's speed over time, [rotors, T] rev/s."""
    points = 2 + math.ceil(samples / rate * _CONTROL_RATE)
    together = p.manoeuvre * _wander(1, points, p.manoeuvre_time, rng)
    alone = p.wander * _wander(p.rotors, points, p.wander_time, rng)
    offset = p.speed_spread * rng.normal(size=(p.rotors, 1))
    # No rotor stops or doubles its speed in flight, whatever the draw.
    relative = np.clip(1 + offset + together + alone, 0.6, 1.6)
    control, time = np.arange(points) / _CONTROL_RATE, np.arange(samples) / rate  # s
    return p.rotor_speed * np.stack([np.interp(time, control, row) for row in relative])


def _wander(rows: int, points: int, correlation_time: float, rng: np.random.Generator) -> _Array:
    """Return an Ornstein-Uhlenbeck process seen through rotor inertia, [rows, points], std 1."""
    a = math.exp(-1 / (correlation_time * _CONTROL_RATE))
    b = math.exp(-1 / (_ROTOR_INERTIA * _CONTROL_RATE))
    warm_up = math.ceil(6 * (correlation_time + _ROTOR_INERTIA) * _CONTROL_RATE)
    steps = rng.normal(size=(rows, warm_up + points)) * math.sqrt(1 - a * a)
    smooth = lfilter([1 - b], [1, -b], lfilter([1], [1, -a], steps))
    # The variance that is left of a unit OU process behind the low-pass filter, in closed form.
    variance = (1 - b) / (1 + b) * (1 + a * b) / (1 - a * b)
    return np.asarray(smooth[:, warm_up:] / math.sqrt(variance))


def _tones(p: DroneParameters, shaft: _Array, highest: float, rate: int, rng: _Rng) -> _Array:
    nyquist_order = rate / 2 / highest - 1  # less 1: modulation puts a sideband above
    audible = 2 ** (_DYNAMIC_RANGE / p.harmonic_slope) if p.harmonic_slope > 0 else math.inf
    count = max(0, int(min(nyquist_order / p.blades, audible, _MOST_HARMONICS)))
    order = np.arange(1, count + 1)
    level = -p.harmonic_slope * np.log2(order) + rng.normal(0, 2.0, count)  # dB
    blade = _harmonics(p.blades * shaft, _gain(level), rng)
    orders = np.arange(1, max(0, min(int(nyquist_order), _SHAFT_ORDERS)) + 1)
    level = p.shaft_level - 6 * np.log2(orders) + rng.normal(0, 3.0, len(orders))
    gain = np.where(orders % p.blades == 0, 0.0, _gain(level))  # the blades already produce these
    imbalance = _harmonics(shaft, gain, rng)
    modulation = 1 + p.am_depth * np.cos(shaft + rng.uniform(0, 2 * np.pi))
    return modulation * (blade + imbalance)


def _harmonics(angle: _Array, gain: _Array, rng: np.random.Generator) -> _Array:
    """Return sum_h gain[h - 1] cos(h angle + phase_h), [T], with drawn phases."""
    phase = rng.uniform(0, 2 * np.pi, len(gain))
    z = np.exp(1j * angle)
    total = np.zeros_like(z)  # a polynomial in z by Horner's rule: one exponential for all
    for coefficient in (gain * np.exp(1j * phase))[::-1]:
        total += coefficient
        total *= z
    return np.asarray(total.real)


def _vortex(p: DroneParameters, shaft: _Array, rate: int, rng: _Rng) -> _Array:
    samples, frequency = len(shaft), np.fft.rfftfreq(len(shaft), 1 / rate)
    x = frequency / (p.vortex_peak * 2 ** rng.normal(0, 0.1))
    hump = (2 * x / (1 + x * x)) ** p.vortex_sharpness  # amplitude: 1 at x = 1, 0 at 0 Hz
    # Turbulence ingested by the rotor: weaker, and falling by 3 dB per octave above 100 Hz.
    ingestion = _gain(-22.0) * (frequency > 20) / np.sqrt(1 + frequency / 100)
    spectrum = np.fft.rfft(rng.normal(size=samples)) * np.hypot(hump, ingestion)
    noise = np.fft.irfft(spectrum, samples) + 1e-12 * rng.normal(size=samples)  # never all zero
    modulation = 1 + p.vortex_am_depth * np.cos(p.blades * shaft + rng.uniform(0, 2 * np.pi))
    return np.asarray(modulation * noise)


def _whine(p: DroneParameters, shaft: _Array, highest: float, rate: int, rng: _Rng) -> _Array:
    order = COMMUTATION_STEPS * p.pole_pairs
    count = min(2, int(rate / 2 / (order * highest)))
    return _harmonics(order * shaft, np.array([1.0, 0.4])[:count], rng)


def _gain(level: float | _Array) -> _Array:
    return np.asarray(10 ** (np.asarray(level) / 20))


def _rms(wave: _Array) -> float:
    return float(np.sqrt(np.mean(np.square(wave))))
