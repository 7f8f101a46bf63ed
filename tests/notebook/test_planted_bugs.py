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
SLOW = ("one_step", "scratch", "stream")
CAUGHT_BY = []  # bug, place, name, and the notebook whose check must notice it


def planted(place, name, *topics):
    """Register a bug: it is given what `place.name` is, and returns what takes its place."""

    def register(bug):
        for topic in topics:
            CAUGHT_BY.append(pytest.param(bug, place, name, topic, id=f"{bug.__name__}-{topic}"))
        return bug

    return register


def another_hop(right, wrong):
    def init(self, n_fft=510, hop_length=256, *args, **more):
        right(self, n_fft, wrong(hop_length), *args, **more)

    return init


@planted(Spectral, "__init__", "stft")
def hop_off_by_one(right):
    """255 samples for 256: as many frames, each a little further off than the one before."""
    return another_hop(right, lambda hop: hop - 1)


@planted(Spectral, "__init__", "stft")
def hop_halved(right):
    return another_hop(right, lambda hop: hop // 2)


@planted(BBED, "std", "sigma", "scratch")
def sigma_times_3_5(right):
    """The noise of one reading of the paper's c, the diffusion of the other."""
    return lambda self, t: 3.5 * right(self, t)


@planted(BBED, "__init__", "sigma")
def theta_taken_for_c(right):
    """The paper prints 0.08 for c where the authors' code has it for theta: 3.5 times less noise,
    in sigma and in g alike."""
    return lambda self, k=2.6, theta=None, c=None: right(self, k, c=c if c is not None else theta)


@planted(model.DiffusionBufferModel, "denoise", "one_step")
def conditioning_one_frame_late(right):
    """The network sees V beside the noisy spectrum of the frame before, in training and after."""
    return lambda self, V, Y, *args, **more: right(self, V, Y.roll(1, dims=-1), *args, **more)


@planted(model, "perturb", "stft")
def conditioning_one_frame_late_in_the_mean(right):
    """V is made of the noisy spectrum of the frame before."""
    return lambda x0, y, t, z, sde: right(x0, y.roll(1, dims=-1), t, z, sde)


@planted(sampler.BufferSampler, "step", "stream")
def conditioning_one_frame_late_in_the_stream(right):
    """Training is right, and the stream's window of Y lags behind its window of V."""

    def step(self, state, R, generator=None):
        newest = state.Y[..., -1].clone()
        out = right(self, state, R, generator)
        state.Y[..., -1] = newest
        return out

    return step


@planted(ClipDataset, "__getitem__", "io_shapes")
def target_and_mix_swapped(right):
    return lambda self, i: right(self, i)[::-1]


@planted(model.DiffusionBufferModel, "trace", "stft")
def target_and_mix_swapped_in_the_model(right):
    return lambda self, mix, target, *args, **more: right(self, target, mix, *args, **more)


@planted(sampler, "reverse_step", "scratch")
def noise_in_the_last_step(right):
    """A frame leaves the buffer with the noise that its step to t = 0 must not add."""

    def reverse_step(x, y, score, t, z, sde):
        step = sde.diffusion(t[:1]) * t[:1].sqrt() * z[..., :1]
        moved = right(x, y, score, t, z, sde)
        return torch.cat([moved[..., :1] + step, moved[..., 1:]], dim=-1)

    return reverse_step


@planted(sampler, "reverse_step", "scratch")
def time_step_of_the_right_neighbour(right):
    """dt = t_{i+1} - t_i for t_i - t_{i-1}: equal for equal times, but for the first frame's."""

    def reverse_step(x, y, score, t, z, sde):
        dt = t - torch.cat([t.new_zeros(1), t[:-1]])
        wrong = torch.cat([dt[1:], dt[-1:]])
        drift = sde.drift(x, y, t) - sde.diffusion(t) ** 2 * score
        return right(x, y, score, t, z, sde) - drift * (wrong - dt)

    return reverse_step


@pytest.mark.parametrize(("bug", "place", "name", "topic"), CAUGHT_BY)
def test_a_planted_bug_fails_a_check(workspace, monkeypatch, bug, place, name, topic):
    monkeypatch.setattr(place, name, bug(getattr(place, name)))
    failure = first_failed_check(find(topic))
    assert failure is not None, f"no check of notebook on {topic} noticed {bug.__name__}"
    assert failure.message, f"{failure.cell} fails without a word"


@pytest.mark.parametrize(
    "topic",
    [
        pytest.param(topic, marks=[pytest.mark.slow] * (topic in SLOW))
        for topic in sorted({each.values[-1] for each in CAUGHT_BY})
    ],
)
def test_without_a_bug_no_check_fails(workspace, topic):
    """Run as the tests above run them, so that their failures are the bugs' own."""
    assert first_failed_check(find(topic)) is None
