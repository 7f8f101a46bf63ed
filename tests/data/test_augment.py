"""Rooms and microphones: what a recording goes through, and what must not change."""

import numpy as np
import pytest
import torch

from diffbuf_lib.data.mixing import change_speed, reverberate, tilt_spectrum
from recipes.cpu_demo.rooms import draw_response

RATE = 16000


def tone(frequency, samples=RATE):
    return torch.sin(2 * torch.pi * frequency * torch.arange(samples) / RATE)[None]


@pytest.mark.law
def test_a_tilt_is_so_many_decibels_an_octave_and_keeps_the_power():
    wave = tone(1000) + tone(2000) + tone(4000)
    tilted = tilt_spectrum(wave, RATE, 3.0)
    level = 20 * torch.fft.rfft(tilted)[0].abs()[[1000, 2000, 4000]].log10()
    torch.testing.assert_close(level.diff(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert float(tilted.square().mean()) == pytest.approx(float(wave.square().mean()), rel=1e-5)
    torch.testing.assert_close(tilt_spectrum(wave, RATE, 0.0), wave, atol=1e-5, rtol=0)
    assert not tilt_spectrum(torch.zeros(1, 100), RATE, 3.0).any()


@pytest.mark.law
@pytest.mark.parametrize("length", [14000, 16000, 17600])
def test_speed_changes_pitch_and_length_alike(length):
    played = change_speed(tone(1000), length)
    assert played.shape == (1, length)
    expected = tone(1000 * RATE / length, length)
    middle = slice(500, length - 500)  # the filter's ends aside
    torch.testing.assert_close(played[:, middle], expected[:, middle], atol=1e-3, rtol=0)
    assert change_speed(torch.zeros(2, RATE), length).shape == (2, length)


@pytest.mark.law
def test_a_room_starts_with_the_direct_sound_and_never_looks_ahead():
    wave = torch.zeros(1, 2000)
    wave[0, 700] = 1
    response = draw_response(np.random.default_rng(0), RATE)
    assert response[0] == 1
    assert response.abs().max() == 1
    wet = reverberate(wave, response)
    assert wet.shape == wave.shape
    assert wet[0, :700].abs().max() < 1e-6
    torch.testing.assert_close(wet[0, 700:900], response[:200], atol=1e-5, rtol=1e-4)


@pytest.mark.law
def test_rooms_differ_and_are_repeated_by_their_seed():
    first, again, other = (draw_response(np.random.default_rng(s), RATE) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    energy = first.square()
    late = float(energy[len(energy) // 2 :].sum() / energy.sum())
    assert 0 < late < 0.3  # it has a tail, and the tail decays
