"""Pictures show the numbers they are given, of runs that went well and of runs that did not."""

import base64
import io
import math
import re

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import pyplot

from diffbuf_lib import figures
from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.sde import BBED, OUVE
from diffbuf_lib.diffusion.spectral import Spectral
from recipes.demo.progress import smooth, training_progress
from tests.conftest import make_model, seeded
from walk import listening, plots, stages

AUDIO = AudioConfig()


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.mark.law
@pytest.mark.parametrize(("center", "first"), [(True, 0.0), (False, 255 / 16000)])
def test_a_frame_is_drawn_at_the_middle_of_its_window(center, first):
    """A click in the middle of a window is loudest in the column drawn at its time."""
    audio = AudioConfig(stft={"center": center})
    times = figures.frame_times(10, 16000, audio.stft)
    assert times[0] == pytest.approx(first)
    wave = torch.zeros(1, 4000)
    wave[0, round(times[3] * 16000)] = 1
    spec = Spectral(**audio.stft.model_dump(), alpha=1)(wave)[0]
    image = plots.spectra({"click": spec}, audio).axes[0].images[0]
    left, right, low, high = image.get_extent()
    column = image.get_array().sum(0).argmax()
    assert left + (column + 0.5) * (right - left) / spec.shape[-1] == pytest.approx(times[3])
    assert (low + high) / 2 == pytest.approx(4, rel=0.01), "kHz"


@pytest.mark.law
def test_a_full_scale_sine_is_0_db_in_its_bin_and_silence_is_dark():
    sine = torch.sin(2 * torch.pi * 32 / AUDIO.stft.n_fft * torch.arange(16000))
    waves = {"sine": sine, "silence": torch.zeros(16000), "bad": sine + sine.roll(1) * math.nan}
    images = [each.images[0] for each in figures.spectrograms(waves, 16000, AUDIO.stft).axes[:3]]
    level = images[0].get_array()[:, 30]
    assert level.argmax() == 32
    assert level[32] == pytest.approx(0, abs=0.01)
    assert images[1].get_array().max() <= images[1].get_clim()[0]
    assert len({image.get_clim() for image in images}) == 1, "one scale"
    assert np.isfinite(images[2].get_array()).all()


def test_every_stage_is_drawn_also_with_nan_and_pyplot_keeps_no_figure(tiny_cfg):
    """The debugger is for runs that went wrong; pyplot is not thread-safe."""
    mix = torch.randn(2, 1, 1600, generator=seeded(3)) * 0.1
    trace = make_model(tiny_cfg).trace(mix, 0.5 * mix, seeded())
    for name in ("mix", "Y", "t", "z", "V", "loss_map", "loss"):
        getattr(trace, name).data.flatten()[:1] = math.nan
        assert figures.to_pixels(stages.stage(trace, name, tiny_cfg)).std() > 1
    assert pyplot.get_fignums() == []


@pytest.mark.law
def test_the_running_mean_is_that_of_numpy():
    values = list(np.random.default_rng(0).normal(size=20))
    means = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(20)]
    np.testing.assert_allclose(smooth(values, 5), means)


def test_progress_shows_losses_and_scores_also_of_a_bad_step(tiny_cfg):
    step = {"grad_norm": 0.1, "lr": 1e-3, "epoch": 0, "valid": None}
    steps = [{**step, "step": i, "loss": 1 / i} for i in range(1, 31)]
    valid = {"step": 30, "epoch": 0, "valid": {"loss": 0.2, "si_sdr": 3.0}, "final": False}
    clip = {"mix": torch.randn(1600), "target": torch.zeros(1600)}
    bad = {**steps[0], "loss": None, "grad_norm": math.inf}
    for history in ([], steps[:1], [bad, *steps[1:]], [*steps, valid]):
        figure = training_progress(history, clip, tiny_cfg.audio)
        assert figures.to_pixels(figure).std() > 5
    loss, scores = map(lines, figure.axes[:2])
    np.testing.assert_allclose(next(iter(loss.values()))[:, 1], [1 / i for i in range(1, 31)])
    assert loss["validation"].tolist() == [[30, 0.2]]
    assert scores["si_sdr"].tolist() == [[30, 3.0]]


@pytest.mark.law
@pytest.mark.parametrize("sde", [BBED(), OUVE()], ids=["bbed", "ouve"])
def test_a_schedule_shows_what_the_sde_says(sde):
    sigma, weight, g, inverse = (
        lines(axes)["it"] for axes in plots.noise_schedule({"it": sde}, 1e-9, 0.8).axes
    )
    t = sigma[:, 0]
    assert t[0] == pytest.approx(1e-9)
    np.testing.assert_allclose(sigma[:, 1], sde.std(torch.from_numpy(t)))
    np.testing.assert_allclose(g[:, 1], sde.diffusion(torch.from_numpy(t)))
    np.testing.assert_allclose(inverse[:, 1], 1 / sigma[:, 1])
    expected = t if isinstance(sde, BBED) else 1 - np.exp(-1.5 * t)
    np.testing.assert_allclose(weight[:, 1], expected, atol=1e-12)


def test_players_play_at_one_peak_and_nan_as_silence():
    waves = {"loud <b>": torch.sin(torch.arange(800) / 7), "quiet": 0.01 * torch.ones(400)}
    page = listening.Players({**waves, "bad": torch.tensor([math.nan, 0.0])}, 8000)._repr_html_()
    found = re.findall(r"base64,([^\"]+)\"", page)
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(each))) for each in found]
    assert [(len(wave), rate) for wave, rate in sounds] == [(800, 8000), (400, 8000), (2, 8000)]
    assert [np.abs(wave).max() for wave, _ in sounds] == pytest.approx([0.9, 0.9, 0], abs=1e-3)
    assert "<b>" not in page, "a caption is text"
