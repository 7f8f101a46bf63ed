"""The STFT: frame counts, exact round trip, compression, and frames that a stream would see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import ShapeError

pytestmark = pytest.mark.law


@pytest.mark.parametrize(
    ("center", "samples", "frames"),
    [(True, 16000, 63), (False, 16000, 61), (True, 32512, 128), (True, 32511, 127)],
)
def test_frames(center, samples, frames):
    spectral = Spectral(center=center)
    assert spectral(torch.zeros(1, samples)).shape == (1, 256, frames)
    assert spectral.num_frames(samples) == frames


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(600, 3000),
    n_fft=st.integers(16, 512),
    overlap=st.integers(2, 4),
    alpha=st.sampled_from([0.3, 0.5, 1.0]),
    window=st.sampled_from(["hann", "hamming", "sqrt_hann"]),
)
def test_round_trip(samples, n_fft, overlap, alpha, window):
    hop = n_fft // overlap
    spectral = Spectral(n_fft=n_fft, hop_length=hop, alpha=alpha, window=window)
    samples -= samples % hop
    wave = torch.randn(2, samples, dtype=torch.float64)
    torch.testing.assert_close(
        spectral.inverse(spectral(wave), samples), wave, rtol=1e-8, atol=1e-8
    )


def test_round_trip_in_float32_and_away_from_the_edges():
    wave = torch.randn(2, 16128).clamp(-1, 1)
    assert (Spectral().inverse(Spectral()(wave), 16128) - wave).abs().max() < 1e-5
    uncentred, wave = Spectral(center=False), wave.double()
    back = uncentred.inverse(uncentred(wave), 16128)
    torch.testing.assert_close(back[:, 510:15000], wave[:, 510:15000])


def test_compression_by_formula_and_back():
    c = torch.randn(3, 5, 7, dtype=torch.complex128)
    spectral = Spectral(alpha=0.5, beta=0.15)
    expected = torch.polar(0.15 * c.abs() ** 0.5, c.angle())
    torch.testing.assert_close(spectral.compress(c), expected)
    torch.testing.assert_close(spectral.expand(expected), c)


def test_frames_do_not_see_the_future():
    spectral = Spectral(n_fft=62, hop_length=32)
    wave = torch.randn(1, 640)
    later = wave.clone()
    later[:, 320:] += 1
    changed = (spectral(wave) - spectral(later)).abs().amax(dim=(0, 1)) > 0
    # Frame k ends before sample 32 k + 31.
    assert changed.tolist() == [32 * k + 31 > 320 for k in range(21)]


@pytest.mark.parametrize("shape", [(16000,), (1, 1, 16000), (1, 0)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ShapeError):
        Spectral()(torch.zeros(shape))
