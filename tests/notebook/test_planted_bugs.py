"""A bug planted in the library makes a notebook's check speak up.

These are the mistakes that people really make in such code and that training survives: the loss
still falls, and only the result is bad. Without a bug every check holds, as nbval shows too.
"""

import pytest

from diffbuf_lib import model
from diffbuf_lib.data.datasets import ClipDataset
from diffbuf_lib.diffusion import sampler
from diffbuf_lib.diffusion.sde import BBED
from diffbuf_lib.diffusion.spectral import Spectral
from tests.notebook.cells import find, first_failed_check


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

    def trace(self, mix, target, generator=None):
        return right(self, target, mix, generator)

    plant(model.DiffusionBufferModel, "trace", trace)


CAUGHT_BY = [
    (hop_off_by_one, "02"),
    (hop_halved, "02"),
    (sigma_times_3_5, "03"),
    (theta_taken_for_c, "03"),
    (conditioning_one_frame_late, "05"),
    (conditioning_one_frame_late_in_the_mean, "02"),
    (conditioning_one_frame_late_in_the_stream, "07"),
    (target_and_mix_swapped, "01"),
    (target_and_mix_swapped_in_the_model, "02"),
]


@pytest.mark.parametrize(
    ("bug", "number"),
    [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in CAUGHT_BY],
)
def test_a_planted_bug_fails_a_check(workspace, monkeypatch, bug, number):
    bug(monkeypatch.setattr)
    failure = first_failed_check(find(number))
    assert failure is not None, f"no check of notebook {number} noticed {bug.__name__}"
    assert failure.message, f"{failure.cell} fails without a word"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow if number in ("05", "07") else ())
        for number in sorted({number for _, number in CAUGHT_BY})
    ],
)
def test_without_a_bug_no_check_fails(workspace, number):
    """Run as the tests above run them, so that their failures are the bugs' own."""
    assert first_failed_check(find(number)) is None
