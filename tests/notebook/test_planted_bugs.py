"""A bug planted in the library makes a notebook's check speak up.

These are the mistakes that people really make in such code and that training survives: the loss
still falls, and only the result is bad. Without a bug every check holds, as nbval shows too.
"""

import pytest
import torch

from diffbuf_lib import model
from diffbuf_lib.data.datasets import ClipDataset
from diffbuf_lib.diffusion import sampler
from diffbuf_lib.diffusion.sde import BBED
from diffbuf_lib.diffusion.spectral import Spectral
from tests.notebook.cells import find, first_failed_check

pytestmark = pytest.mark.law


def hop_off_by_one(plant):
    """255 samples for 256: as many frames, each a little further off than the one before."""
    plant_hop(plant, lambda hop: hop - 1)


def hop_halved(plant):
    plant_hop(plant, lambda hop: hop // 2)


def plant_hop(plant, wrong):
    right = Spectral.__init__

    def init(self, n_fft=510, hop_length=256, *args, **kwargs):
        right(self, n_fft, wrong(hop_length), *args, **kwargs)

    plant(Spectral, "__init__", init)


def sigma_times_3_5(plant):
    """The noise of one reading of the paper's c, the diffusion of the other."""
    right = BBED.std
    plant(BBED, "std", lambda self, t: 3.5 * right(self, t))


def theta_taken_for_c(plant):
    """The paper prints 0.08 for c where the authors' code has it for theta: 3.5 times less noise,
    in sigma and in g alike."""
    right = BBED.__init__

    def init(self, k=2.6, theta=None, c=None):
        right(self, k, c=c if c is not None else theta)

    plant(BBED, "__init__", init)


def conditioning_one_frame_late(plant):
    """The network sees V beside the noisy spectrum of the frame before, in training and after."""
    right = model.DiffusionBufferModel.denoise

    def denoise(self, V, Y, *args, **kwargs):
        return right(self, V, Y.roll(1, dims=-1), *args, **kwargs)

    plant(model.DiffusionBufferModel, "denoise", denoise)


def conditioning_one_frame_late_in_the_mean(plant):
    """V is made of the noisy spectrum of the frame before."""
    right = model.perturb
    plant(model, "perturb", lambda x0, y, t, z, sde: right(x0, y.roll(1, dims=-1), t, z, sde))


def conditioning_one_frame_late_in_the_stream(plant):
    """Training is right, and the stream's window of Y lags behind its window of V."""
    right = sampler.BufferSampler.step

    def step(self, state, R, generator=None):
        newest = state.Y[..., -1].clone()
        out = right(self, state, R, generator)
        state.Y[..., -1] = newest
        return out

    plant(sampler.BufferSampler, "step", step)


def target_and_mix_swapped(plant):
    right = ClipDataset.__getitem__
    plant(ClipDataset, "__getitem__", lambda self, i: right(self, i)[::-1])


def target_and_mix_swapped_in_the_model(plant):
    right = model.DiffusionBufferModel.trace

    def trace(self, mix, target, *args, **kwargs):
        return right(self, target, mix, *args, **kwargs)

    plant(model.DiffusionBufferModel, "trace", trace)


def noise_in_the_last_step(plant):
    """A frame leaves the buffer with the noise that its step to t = 0 must not add."""
    right = sampler.reverse_step

    def reverse_step(x, y, score, t, z, sde):
        step = sde.diffusion(t[:1]) * t[:1].sqrt() * z[..., :1]
        moved = right(x, y, score, t, z, sde)
        return torch.cat([moved[..., :1] + step, moved[..., 1:]], dim=-1)

    plant(sampler, "reverse_step", reverse_step)


def time_step_of_the_right_neighbour(plant):
    """dt = t_{i+1} - t_i for t_i - t_{i-1}: equal for equal times, but for the first frame's."""
    right = sampler.reverse_step

    def reverse_step(x, y, score, t, z, sde):
        dt = t - torch.cat([t.new_zeros(1), t[:-1]])
        wrong = torch.cat([dt[1:], dt[-1:]])
        drift = sde.drift(x, y, t) - sde.diffusion(t) ** 2 * score
        return right(x, y, score, t, z, sde) - drift * (wrong - dt)

    plant(sampler, "reverse_step", reverse_step)


SLOW = ("one_step", "scratch", "stream")
CAUGHT_BY = [
    (hop_off_by_one, "stft"),
    (hop_halved, "stft"),
    (sigma_times_3_5, "sigma"),
    (theta_taken_for_c, "sigma"),
    (conditioning_one_frame_late, "one_step"),
    (conditioning_one_frame_late_in_the_mean, "stft"),
    (conditioning_one_frame_late_in_the_stream, "stream"),
    (target_and_mix_swapped, "io_shapes"),
    (target_and_mix_swapped_in_the_model, "stft"),
    (sigma_times_3_5, "scratch"),
    (noise_in_the_last_step, "scratch"),
    (time_step_of_the_right_neighbour, "scratch"),
]


@pytest.mark.parametrize(
    ("bug", "topic"),
    [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in CAUGHT_BY],
)
def test_a_planted_bug_fails_a_check(workspace, monkeypatch, bug, topic):
    bug(monkeypatch.setattr)
    failure = first_failed_check(find(topic))
    assert failure is not None, f"no check of notebook on {topic} noticed {bug.__name__}"
    assert failure.message, f"{failure.cell} fails without a word"


@pytest.mark.parametrize(
    "topic",
    [
        pytest.param(topic, marks=[pytest.mark.slow] * (topic in SLOW))
        for topic in sorted({topic for _, topic in CAUGHT_BY})
    ],
)
def test_without_a_bug_no_check_fails(workspace, topic):
    """Run as the tests above run them, so that their failures are the bugs' own."""
    assert first_failed_check(find(topic)) is None
