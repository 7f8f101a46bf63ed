"""The running level: the same in a stream as in the whole, so causal, and deaf to a gain."""

import pytest
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.diffusion.level import FLOOR, RunningLevel
from diffbuf_lib.diffusion.spectral import Spectral
from tests.conftest import TINY, make_model, seeded

pytestmark = pytest.mark.law
ON = "preprocessing.level_seconds=0.05"


def noise(samples, seed=0):
    return 0.1 * torch.randn(1, samples, generator=seeded(seed), dtype=torch.float64)


def level_of(wave, seconds=0.5):
    spectral = Spectral().double()
    return RunningLevel(seconds, 16000, spectral).of_whole(spectral(wave))


def test_of_steady_noise_it_is_the_rms():
    level = level_of(noise(64000))
    torch.testing.assert_close(
        level[0, 100:], torch.full_like(level[0, 100:], 0.1), rtol=0.1, atol=0
    )


def test_silence_before_and_within_changes_nothing():
    wave = noise(16128)
    quiet = torch.nn.functional.pad(wave, (256 * 7, 0))
    torch.testing.assert_close(level_of(quiet)[:, 9:], level_of(wave)[:, 2:])
    assert (level_of(torch.zeros(1, 4000, dtype=torch.float64)) == FLOOR).all()


@pytest.mark.parametrize("loss", ["weighted_score", "data_prediction"])
@pytest.mark.parametrize("gain", [0.003, 30.0])
def test_the_level_of_the_input_does_not_matter(loss, gain):
    model = make_model(build_config(TINY, [ON, f"training.loss={loss}"])).double()
    wave = noise(1600)[None]
    enhanced = model.enhance(wave, seeded(1))
    torch.testing.assert_close(model.enhance(gain * wave, seeded(1)), gain * enhanced)
    target = noise(1600, 5)[None]
    one, other = (model.trace(g * wave, g * target, seeded(2)) for g in (1, gain))
    torch.testing.assert_close(one.V, other.V)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(gain * one.level, other.level)


def test_trace_and_stream_have_the_same_level():
    """Of a clip after leading zeros, as training has it."""
    cfg = build_config(TINY, [ON])
    model = make_model(cfg).double()
    wave = torch.nn.functional.pad(noise(1600), (9 * 32, 0))[None]
    trace = model.trace(wave, wave, seeded())
    sampler = model.sampler()
    state = sampler.start(1, 32, seeded(), torch.complex128)
    for k, R in enumerate(model.spectral(wave[0]).unbind(-1)):
        sampler.step(state, R, seeded())
        torch.testing.assert_close(state.Y[..., -1], trace.Y[..., k])
