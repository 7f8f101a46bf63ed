import dataclasses

import numpy as np
import pytest
import torch

from recipes.demo.drone import DroneParameters, _rotor_speeds, _wander, synthesise
from tests.conftest import refused

RATE = 16000
STEADY = DroneParameters(
    speed_spread=0.0, wander=0.0, manoeuvre=0.0, rotor_speed=80.0, blades=3, vortex_level=-20.0
)


def spectrum(seconds=2, rate=RATE, **changes):
    """Frequencies in Hz and power of a Hann-windowed synthesis."""
    parameters = dataclasses.replace(STEADY, **changes)
    wave = synthesise(parameters, seconds * rate, rate, np.random.default_rng(0))[0].numpy()
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    return np.fft.rfftfreq(len(wave), 1 / rate), power


def prominence(frequency, power, at, width=5.0):
    """The peak near a frequency over the median around it, dB."""
    near = np.abs(frequency - at) < width
    around = (np.abs(frequency - at) < 40) & ~near
    return 10 * np.log10(power[near].max() / np.median(power[around]))


@pytest.mark.law
@pytest.mark.parametrize("blades", [2, 3])
@pytest.mark.parametrize("speed", [60.0, 97.0])
def test_the_strongest_tones_are_harmonics_of_the_blade_passing_frequency(blades, speed):
    options = {"shaft_level": -90.0, "am_depth": 0.0}
    frequency, power = spectrum(blades=blades, rotor_speed=speed, **options)
    for harmonic in range(1, 6):
        assert prominence(frequency, power, harmonic * blades * speed) > 20
    assert prominence(frequency, power, 1.5 * blades * speed) < 15
    strongest = frequency[power.argmax()] / (blades * speed)
    assert strongest == pytest.approx(round(strongest), abs=0.01)


@pytest.mark.law
def test_imbalance_adds_the_shaft_rate_and_the_motor_its_commutation_frequency():
    frequency, power = spectrum(shaft_level=-6.0, am_depth=0.0)
    _, without = spectrum(shaft_level=-90.0, am_depth=0.0)
    assert prominence(frequency, power, 80.0) > 15
    assert prominence(frequency, without, 80.0) < 15
    frequency, power = spectrum(whine_level=-10.0, pole_pairs=7)
    assert prominence(frequency, power, 6 * 7 * 80.0) > 20


@pytest.mark.law
def test_no_tone_aliases():
    """At 4 kHz the harmonics of 240 Hz end at 1920 Hz: nothing may fold back between them."""
    silent = {"vortex_level": -120.0, "shaft_level": -120.0, "am_depth": 0.0}
    frequency, power = spectrum(rate=4000, harmonic_slope=0.1, **silent)
    far = np.abs(frequency / 240 - np.round(frequency / 240)) * 240 > 10
    assert power[far].max() < 1e-6 * power.max()
    whine = {"whine_level": 0.0, "pole_pairs": 7}  # 3360 Hz: above Nyquist
    _, whining = spectrum(rate=4000, harmonic_slope=0.1, **silent, **whine)
    assert whining[far].max() < 1e-6 * power.max()


@pytest.mark.law
def test_vortex_noise_peaks_where_strouhal_says_and_beats_with_the_blades():
    vortex = {"vortex_level": 60.0, "vortex_sharpness": 2.0, "vortex_am_depth": 1.0, "rotors": 1}
    parameters = dataclasses.replace(STEADY, **vortex)
    frequency, power = spectrum(seconds=4, **vortex)
    octaves = parameters.vortex_peak * 2.0 ** np.arange(-3.25, 1, 0.5)
    levels = [power[(frequency > f) & (frequency < f * 2**0.5)].mean() for f in octaves]
    assert octaves[int(np.argmax(levels))] * 2**0.25 == pytest.approx(
        parameters.vortex_peak, rel=0.35
    )
    wave = synthesise(parameters, 4 * RATE, RATE, np.random.default_rng(1))[0].numpy()
    envelope = wave**2 - np.mean(wave**2)
    beat = np.abs(np.fft.rfft(envelope)) ** 2
    assert prominence(np.fft.rfftfreq(len(wave), 1 / RATE), beat, 240.0, width=2.0) > 15


@pytest.mark.law
def test_speed_wanders_as_far_as_asked():
    paths = _wander(400, 300, 0.3, np.random.default_rng(0))
    assert paths.std() == pytest.approx(1.0, abs=0.05)
    assert paths[:, 0].std() == pytest.approx(1.0, abs=0.1)  # stationary from the first point
    speeds = _rotor_speeds(DroneParameters(), 8 * RATE, RATE, np.random.default_rng(0))
    assert speeds.shape == (4, 8 * RATE)
    assert len(np.unique(speeds[:, 0])) == 4
    assert np.abs(np.diff(speeds)).max() * RATE < 200  # rev/s per s: no jumps


@pytest.mark.law
@pytest.mark.parametrize("seed", range(12))
def test_every_drawn_drone_is_finite_and_reproducible(seed):
    rng = np.random.default_rng(seed)
    parameters = DroneParameters.draw(rng)
    assert 90 <= parameters.blades * parameters.rotor_speed <= 450
    wave = synthesise(parameters, 4001, RATE, np.random.default_rng(seed))
    assert wave.shape == (1, 4001)
    assert wave.dtype == torch.float32
    assert bool(torch.isfinite(wave).all())
    assert float(wave.abs().max()) == 1
    assert torch.equal(wave, synthesise(parameters, 4001, RATE, np.random.default_rng(seed)))
    assert not torch.equal(wave, synthesise(parameters, 4001, RATE, np.random.default_rng(99)))


def test_what_is_no_drone():
    refused(lambda: DroneParameters(rotors=0), "rotors 0")
    refused(lambda: synthesise(STEADY, 0, RATE, np.random.default_rng(0)), "at least 1 sample")
