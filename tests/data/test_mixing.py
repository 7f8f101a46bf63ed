import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib.data import mix_pair
from diffbuf_lib.data.mixing import PEAK_LIMIT, reverberate, snr, tilt_spectrum
from tests.conftest import refused
from tests.data.conftest import RATE, noise_wave

wave = partial(noise_wave, samples=800)


@pytest.mark.law
@settings(max_examples=60, deadline=None)
@given(
    snr_db=st.floats(-40, 40),
    distance=st.floats(0.5, 50),
    loudness=st.floats(0.01, 50),
    seed=st.integers(0, 1000),
)
def test_laws_of_a_mixture(snr_db, distance, loudness, seed):
    speech, noise = wave(seed), wave(seed + 5000)
    made = mix_pair(loudness * speech, noise, snr_db, distance)
    assert snr(made.target, made.noise) == pytest.approx(snr_db, abs=1e-3)
    power = [float(part.double().square().sum()) for part in (made.target, made.noise)]
    assert 10 * math.log10(power[0] / power[1]) == pytest.approx(snr_db, abs=1e-3)
    assert torch.equal(made.mix, made.target + made.noise)
    peak = max(float(part.abs().max()) for part in made[:3])
    assert peak <= PEAK_LIMIT + 1e-6
    assert made.scale == 1 or peak == pytest.approx(PEAK_LIMIT, rel=1e-5)
    # The target is the speech but for one factor, 1 / (peak distance) times the joint scale.
    factor = made.scale / (distance * float(loudness * speech.abs().max()))
    torch.testing.assert_close(made.target, loudness * speech * factor, rtol=1e-6, atol=1e-9)
    # The noise's distance is undone by the SNR.
    other = mix_pair(loudness * speech, noise, snr_db, distance, 4.0)
    torch.testing.assert_close(made.mix, other.mix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 800), wave(1), 0.0, 5.0), "speech is silent"),
        ((wave(0), torch.full((1, 800), 1e-5), 0.0, 5.0), "noise is silent"),
        ((wave(0), wave(1)[:, 1:], 0.0, 5.0), "differ in shape"),
        ((wave(0, channels=2), wave(1), 0.0, 5.0), "differ in shape"),
        ((wave(0), wave(1), 0.0, 0.0), "distance 0.0"),
        ((wave(0), wave(1), math.nan, 5.0), "nan"),
    ],
)
def test_what_cannot_be_mixed(arguments, message):
    refused(lambda: mix_pair(*arguments), message)


@pytest.mark.law
def test_a_tilt_is_so_many_decibels_an_octave_and_keeps_the_power():
    time = torch.arange(RATE) / RATE
    wave = sum(torch.sin(2 * torch.pi * f * time)[None] for f in (1000, 2000, 4000))
    tilted = tilt_spectrum(wave, RATE, 3.0)
    level = 20 * torch.fft.rfft(tilted)[0].abs()[[1000, 2000, 4000]].log10()
    torch.testing.assert_close(level.diff(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert float(tilted.square().mean()) == pytest.approx(float(wave.square().mean()), rel=1e-5)
    torch.testing.assert_close(tilt_spectrum(wave, RATE, 0.0), wave, atol=1e-5, rtol=0)
    assert not tilt_spectrum(torch.zeros(1, 100), RATE, 3.0).any()


@pytest.mark.law
def test_a_room_starts_with_the_direct_sound_and_never_looks_ahead():
    wave = torch.zeros(1, 2000)
    wave[0, 700] = 1
    tail = np.random.default_rng(0).normal(size=4000) * np.exp(-np.arange(4000) / 800)
    response = torch.from_numpy(tail / (2 * np.abs(tail).max())).float()
    response[0] = 1  # the direct sound
    wet = reverberate(wave, response)
    assert wet.shape == wave.shape
    assert wet[0, :700].abs().max() < 1e-6
    torch.testing.assert_close(wet[0, 700:900], response[:200], atol=1e-5, rtol=1e-4)
